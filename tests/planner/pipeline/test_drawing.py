"""Drawings of timetables and of runs with failures."""

import pytest

from megatron_ds.planner.failures.closed_forms import Faults, Saving
from megatron_ds.planner.failures.goodput import Span, simulate_run
from megatron_ds.planner.pipeline.drawing import draw_run, draw_timetable
from megatron_ds.planner.pipeline.timetable import StageTimes, Timetable, simulate


def timetable(num_ranks: int, num_micro_batches: int, num_chunks: int = 1, seconds: float = 1.0) -> Timetable:
    stages = [StageTimes(seconds / num_chunks, 2 * seconds / num_chunks)] * (num_ranks * num_chunks)
    schedule = "interleaved" if num_chunks > 1 else "1f1b"
    return simulate(stages, num_micro_batches, schedule, num_chunks=num_chunks)


def test_a_small_pipeline() -> None:
    """2 ranks and 3 micro-batches: 12 s in 48 columns."""
    drawn = draw_timetable(timetable(2, 3), 62).splitlines()
    assert drawn == [
        "1F1B: 2 ranks, 3 micro-batches, 12.0 s, 25.0 % waiting",
        "rank 0 ▕0───1───········0▒▒▒▒▒▒▒2───1▒▒▒▒▒▒▒····2▒▒▒▒▒▒▒▏ 25 %",
        "rank 1 ▕····0───0▒▒▒▒▒▒▒1───1▒▒▒▒▒▒▒2───2▒▒▒▒▒▒▒········▏ 25 %",
        "        0 s                                       12.0 s",
        "2─ forward of micro-batch 2, 2▒ backward",
        "· waiting (right: % waiting)",
    ]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
@pytest.mark.parametrize("sizes", [(1, 1), (4, 8), (8, 64), (64, 64), (16, 512), (4, 8, 2), (8, 64, 2)])
def test_drawings_have_the_width_of_the_terminal(sizes: tuple[int, ...], width: int) -> None:
    found = timetable(*sizes)
    for unicode in (True, False):
        lines = draw_timetable(found, width, unicode=unicode).splitlines()
        rows = [line for line in lines if line.startswith("rank")]
        assert len({len(row) for row in rows}) == 1 and max(len(line) for line in lines[1:]) <= width
        assert len(rows[0]) == width
        assert len(rows) == min(sizes[0], 16)
        assert "\n".join(lines).isascii() != unicode


def test_a_long_step_shows_how_the_pipeline_fills_and_drains() -> None:
    lines = draw_timetable(timetable(8, 64), 80).splitlines()
    first, last = lines[1], lines[8]
    assert first.startswith("rank 0 ▕────────") and "⋯" in first and first.split("▏")[0].endswith("▒")
    assert last.startswith("rank 7 ▕·······─0▒") and last.split("▏")[0].endswith("▒" + "·" * 14)
    assert lines[-1].endswith("⋯ 150 s not drawn")


def test_a_deep_pipeline_is_drawn_whole() -> None:
    lines = draw_timetable(timetable(64, 64), 80).splitlines()
    assert "⋯" not in "".join(lines) and lines[9].strip() == "⋮"
    assert lines[1].startswith("rank 0  ▕─") and lines[1].split("▏")[0].endswith("▒")
    assert lines[10].startswith("rank 56 ▕·") and lines[10].split("▏")[0].endswith("·")


def test_one_micro_batch() -> None:
    lines = draw_timetable(timetable(2, 1), 60).splitlines()
    assert lines[0].startswith("1F1B: 2 ranks, 1 micro-batch, 6.00 s, ")
    assert lines[-2] == "0─ forward of micro-batch 0, 0▒ backward"


def test_units_of_time() -> None:
    assert "12.0 ms" in draw_timetable(timetable(2, 3, seconds=1e-3), 80)
    assert "12.0 us" in draw_timetable(timetable(2, 3, seconds=1e-6), 80)
    assert ", 0 s, 0.0 % waiting" in draw_timetable(timetable(2, 3, seconds=0.0), 80)


def test_a_run_with_a_failure() -> None:
    spans = [Span("restart", 0, 3600), Span("useful", 3600, 36000), Span("lost", 36000, 43200)]
    spans += [Span("detection", 43200, 43260), Span("restart", 43260, 46860), Span("useful", 46860, 86400)]
    assert draw_run(spans, 50).splitlines() == [
        f"▕rr{'█' * 18}░░░░rr{'█' * 22}▏",
        f" 0 h{'24 h'.rjust(45)}",
        "█ training   ░ lost training   r restart",
    ]


def test_a_simulated_run() -> None:
    faults = Faults(2048, spare_nodes=0, repair_hours=3, broken_share=1.0)
    drawn = draw_run(simulate_run(800, Saving(30, 60), faults, days=1, seed=4), 80, unicode=False)
    assert drawn.isascii() and "waiting for a node" in drawn and "wwwwwwwwww" in drawn
    assert len(drawn.splitlines()[0]) == 80
