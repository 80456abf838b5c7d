"""The metrics file: bit-equal, always JSON, never overwritten, whole after a crash and a resume."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.errors import DataError
from megatron_ds.monitor import MetricsWriter, StepMetrics, ValidMetrics, iter_metrics, metrics, read_metrics
from tests.full_disk import limited_files

STEP = StepMetrics(
    step=1,
    loss=0.1 + 0.2,
    grad_norm=1 / 3,
    lr=3e-4,
    tokens=32768,
    step_s=math.pi,
    tokens_per_s=1e300,
    tflops_per_rank=5e-324,
    data_s=2 / 7,
)


def write(path: Path, steps: range, continue_after: int | None = None) -> None:
    with MetricsWriter(path, continue_after) as writer:
        for step in steps:
            writer.write(replace(STEP, step=step))


def steps_of(path: Path) -> list[int]:
    return [one.step for one in iter_metrics(path)]


def test_reads_back_bit_equal(tmp_path: Path) -> None:
    path = tmp_path / "made" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(STEP)
        writer.write(ValidMetrics(step=1, valid_loss=2 / 3))
    assert read_metrics(path) == ([STEP], [ValidMetrics(1, 2 / 3)])
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert list(first) == [
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "step_s",
        "tokens_per_s",
        "tflops_per_rank",
        "data_s",
    ]
    assert first["loss"] == 0.1 + 0.2 and first["tflops_per_rank"] == 5e-324
    assert second == {"step": 1, "valid_loss": 2 / 3}


def test_terms_and_metrics_stand_there_where_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    step = replace(STEP, terms={"chosen": 1 / 3, "step": 0.5}, metrics={"accuracy": 2 / 3, "tokens": 1.5})
    valid = ValidMetrics(1, 2 / 3, {"accuracy": 0.1 + 0.2})
    with MetricsWriter(path) as writer:
        writer.write(step)
        writer.write(valid)
        writer.write(replace(step, metrics={"accuracy": math.inf}))
    first, second, third = (json.loads(line) for line in path.read_text().splitlines())
    assert first["terms"] == step.terms and first["metrics"] == step.metrics
    assert second == {"step": 1, "valid_loss": 2 / 3, "metrics": {"accuracy": 0.1 + 0.2}}
    assert third["metrics"] == {"accuracy": None}
    (read, last), read_valid = read_metrics(path)
    assert (read, read_valid) == (step, [valid]) and math.isnan(last.metrics["accuracy"])


def test_files_of_earlier_versions_have_no_wait_for_data(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(STEP)
        writer.write(replace(STEP, data_s=None))
        writer.write(replace(STEP, data_s=math.nan))
    first, second, third = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {**second, "data_s": 2 / 7} and "data_s" not in second
    assert third["data_s"] is None and third["non_finite"] == ["data_s"]
    steps, _ = read_metrics(path)
    assert steps[:2] == [STEP, replace(STEP, data_s=None)] and math.isnan(steps[2].data_s or 0.0)
    write(path, range(2, 3), continue_after=1)
    assert len(path.read_text().splitlines()) == 4, "and a run goes on in them"


def test_memory_and_mfu_are_written_where_they_are_known_and_older_files_lack_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    used = replace(STEP, mfu=0.1 + 0.2, peak_memory_bytes=2**55 + 1, reserved_memory_bytes=2**56 + 1)
    with MetricsWriter(path) as writer:
        writer.write(STEP)
        writer.write(used)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    added = {"mfu": 0.1 + 0.2, "peak_memory_bytes": 2**55 + 1, "reserved_memory_bytes": 2**56 + 1}
    assert second == {**first, **added} and not added.keys() & first.keys()
    assert read_metrics(path)[0] == [STEP, used]


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write(STEP)
    assert steps_of(writer.path) == [1]
    writer.close()


def test_array_scalars_keep_their_value(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(replace(STEP, step=np.int64(7), loss=np.float32(0.1)))  # type: ignore[arg-type]
    record = json.loads(path.read_text())
    assert record["step"] == 7 and record["loss"] == float(np.float32(0.1)) != 0.1


def test_non_finite_values_are_null_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(replace(STEP, loss=math.nan, grad_norm=-math.inf))
        writer.write(ValidMetrics(1, math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    step, valid = (json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines())
    assert step["loss"] is None and step["grad_norm"] is None and step["non_finite"] == ["loss", "grad_norm"]
    assert valid == {"step": 1, "valid_loss": None, "non_finite": ["valid_loss"]}
    steps, valids = read_metrics(path)
    assert math.isnan(steps[0].loss) and steps[0].lr == STEP.lr and math.isnan(valids[0].valid_loss)


def test_new_runs_keep_the_files_of_earlier_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for last in (3, 5, 7):
        write(path, range(1, last))
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert steps_of(tmp_path / "metrics.1.jsonl") == [1, 2]
    assert steps_of(tmp_path / "metrics.2.jsonl") == [1, 2, 3, 4]
    (tmp_path / "metrics.1.jsonl").unlink()
    write(path, range(1, 2))
    assert steps_of(tmp_path / "metrics.3.jsonl") == [1, 2, 3, 4, 5, 6], "a later run gets a greater number"


def test_an_empty_file_is_taken_over(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", range(0))
    write(tmp_path / "metrics.jsonl", range(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_goes_on_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5))
    write(path, range(5, 7), continue_after=4)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert [other.name for other in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_drops_steps_it_runs_again_but_keeps_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 7))
    with path.open("a") as file:
        file.write('{"step": 7, "lo')
    write(path, range(5, 8), continue_after=4)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7]
    assert path.read_text().count("\n") == 7
    assert (tmp_path / "metrics.1.jsonl").read_text().endswith('{"step": 7, "lo')
    assert sorted(other.name for other in tmp_path.iterdir()) == ["metrics.1.jsonl", "metrics.jsonl"]


@pytest.mark.parametrize(
    "junk", [b'{"step": 3, "lo', b"\x00" * 80, b"\xff\x80\n", b'{"step": 3}\n', b"[" * 9999 + b"\n", b"\n"]
)
@pytest.mark.parametrize("where", ["end", "middle"])
def test_a_resumed_run_leaves_junk_out_and_keeps_a_copy(where: str, junk: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 3))
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([lines[0], junk, lines[1]] if where == "middle" else [*lines, junk])
    path.write_bytes(damaged)
    write(path, range(3, 5), continue_after=2)
    lost = where == "middle" and not junk.endswith(b"\n")  # it has taken the next line with it
    assert steps_of(path) == [1, *([] if lost else [2]), 3, 4]
    assert (tmp_path / "metrics.1.jsonl").read_bytes() == damaged


def test_metrics_wait_for_room_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr(metrics, "MOST_WAITING", 3)
    writer = MetricsWriter(path)
    writer.write(STEP)
    with limited_files(path.stat().st_size + 20):
        for step in range(2, 5):
            writer.write(replace(STEP, step=step))
        assert steps_of(path) == [1] and writer.unwritten is None
        writer.write(ValidMetrics(4, 1.5))
        assert writer.unwritten == f"4 lines of {path} wait to be written (File too large)"
        assert steps_of(path) == [1], "no line is cut off"
    writer.write(replace(STEP, step=5))
    assert writer.unwritten is None
    writer.close()
    assert steps_of(path) == [1, 2, 3, 4, 4, 5]


def test_a_resumed_run_without_a_file_starts_one(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", range(5, 7), continue_after=4)
    assert steps_of(tmp_path / "metrics.jsonl") == [5, 6]


def test_fields_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "valid_loss": 1.5, "new": [1]}\n')
    assert read_metrics(path) == ([], [ValidMetrics(3, 1.5)])


@pytest.mark.parametrize("line", ["not json", "[1]", "3", '{"step": 1}', '{"step": null, "valid_loss": 1.0}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 2))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2 is no line of metrics"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        read_metrics(tmp_path / "nowhere.jsonl")
