"""Published training runs, predicted: few constants of devices and systems, none of a row."""

import re
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import yaml

from tests.planner.published import GROUPS, NEAR, Prediction, predictions, show, summary, table, with_sections
from tests.planner.published_memory import GIB, memory_of, published_gib
from tests.planner.published_model import Sizes
from tests.planner.published_rows import ROWS, Row, derived_s, flops_per_token, published_s, read_rows, why_left_out
from tests.planner.published_step import blocks_of_stages, predict
from tests.planner.published_systems import BY_SOURCE, setting_of

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"


@cache
def rows() -> list[Row]:
    return read_rows(ROWS)


@cache
def predicted() -> list[Prediction]:
    return predictions(rows())


def test_errors_are_small() -> None:
    found = predicted()
    print(table(found))
    print(summary(found))
    errors = [abs(one.error) for one in found]
    assert len(found) > 75
    assert median(errors) <= 0.08
    assert sum(error <= NEAR for error in errors) >= 0.8 * len(errors)


def test_rows_have_sources_and_are_used_or_left_out_for_a_reason() -> None:
    assert len(rows()) == 105 and len({row["id"] for row in rows()}) == 105
    assert all(row["source"] for row in rows())
    for row in rows():
        assert why_left_out(row) is None or published_s(row) is None or why_left_out(row, timed=False)
    settings = {setting_of(row).system.name for row in rows()}
    assert len(settings) <= len(BY_SOURCE) + 1, "a system is no setting of a row"


def test_printed_flops_follow_from_rows() -> None:
    """A row's sizes, layout and conventions were read correctly where its FLOP/s follow from its seconds."""
    compared = 0
    for row in rows():
        seconds, printed = published_s(row), row["measured"]["tflops_gpu"]
        if seconds is None or not printed or row.get("known_mismatch") or "mla" in row["model"]:
            continue
        tokens = row["global_batch"] * row["model"]["seq"] / (seconds * row["gpus"])
        assert flops_per_token(row) * tokens / 1e12 == pytest.approx(printed, rel=0.03), row["id"]
        compared += 1
    assert compared > 40


def test_seconds_that_follow_from_flops() -> None:
    """GPT of 1008 B on 3,072 devices: 3,072 rows of 2,048 tokens at 163 TFLOP/s (Narayanan et al. 2021, table 1)."""
    row = next(row for row in rows() if row["id"] == "narayanan21-1008B")
    by_paper = 96 * 3072 * 2048 * 128 * 25600**2 * (1 + 2048 / (6 * 25600) + 51200 / (16 * 128 * 25600))
    assert derived_s(row) == pytest.approx(by_paper / (163e12 * 3072), rel=2e-3)


@pytest.mark.parametrize(
    ("blocks", "stages", "expected"),
    [
        (96, 8, [12] * 8),
        (78, 12, [7] * 11 + [1]),
        (70, 12, [5, *[6] * 10, 5]),
        (126, 8, [15, *[16] * 6, 15]),
        (3, 4, [1, 1, 1, 0]),
    ],
)
def test_blocks_of_stages(blocks: int, stages: int, expected: list[int]) -> None:
    assert blocks_of_stages(blocks, stages) == expected


def test_other_files_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fields may be null; an unknown source gets a system by its fields."""
    by_id = {row["id"]: row for row in rows()}
    other = dict(
        by_id["llmfoundry-7b-a100-8"], id="other", source="somebody's page", micro_batch=None, dp=None, cp=None
    )
    other |= {"vp": None, "ep": None, "sequence_parallel": None, "certain": None, "note": None}
    strange = dict(by_id["palm-540b"], id="strange")
    path = tmp_path / "rows.yaml"
    path.write_text(yaml.safe_dump({"runs": [other, strange]}))
    show(path)
    printed = capsys.readouterr().out
    assert "| other |" in printed and "fsdp: 1 rows" in printed
    assert "left out: strange: no profile of TPUv4" in printed


def test_sizes_of_models() -> None:
    by_id = {row["id"]: row for row in rows()}
    sizes = Sizes.of(by_id["mbridge25.11-qwen3-30b-h100"]["model"])
    params = sizes.layers * (sizes.attention_params + sizes.expert_params + sizes.shared_params)
    assert params + 2 * sizes.embedding_params == pytest.approx(30.5e9, rel=0.01)


def test_memory_of_the_split_that_a_paper_computes() -> None:
    """Korthikanti et al. 2022, figures 1 and 7: 18 bytes of a parameter, and activations by their formulas."""
    split = [row for row in rows() if row["measured"].get("mem_params_opt_gib")]
    for row in split:
        memory, measured = memory_of(row, predict(row)), row["measured"]
        assert memory.state_bytes / GIB == pytest.approx(measured["mem_params_opt_gib"], rel=0.09), row["id"]
        total = (memory.state_bytes + memory.activation_bytes) / GIB
        assert total == pytest.approx(published_gib(row), rel=0.09), row["id"]
    assert len(split) == 7


def test_page_has_these_tables() -> None:
    """Text is equal; numbers may be off by what a later change of a layer's operations moves them, until rewritten."""
    page, number = PAGE.read_text(), r"[-+]?\d+\.\d+"
    expected = with_sections(page, rows(), predicted())
    command = "try python -m tests.planner.published --docs docs/planning.md"
    assert re.sub(number, "0", expected) == re.sub(number, "0", page), command
    found, wanted = ([float(one) for one in re.findall(number, text)] for text in (page, expected))
    assert found == pytest.approx(wanted, rel=0.01, abs=0.5), command
    for title, _ in GROUPS:
        assert f"### {title}" in page
