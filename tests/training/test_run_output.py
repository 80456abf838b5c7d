"""The account of what a run has taken of its corpora: a file at each save, a line at the end."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ds.checkpoint.saver import Saved
from megatron_ds.config import RunConfig, build_run, dump_run
from megatron_ds.data import Order, open_dataset
from megatron_ds.data.blend import SourceUsage
from megatron_ds.data.indexed.files import write_index
from megatron_ds.data.objective import Causal
from megatron_ds.errors import ConfigError, TrainingError
from megatron_ds.monitor import SilentReporter, StepMetrics, metrics, read_metrics
from megatron_ds.monitor.line_file import LineFile
from megatron_ds.training.run_output import RunOutput, describe_usage
from tests.full_disk import limited_files
from tests.training.test_loop import SUMMARY, CountingEngine, Listener, travel
from tests.training.tiny import run_mapping

STEP = StepMetrics(1, 0.5, 0.25, 1e-3, tokens=100, step_s=0.5, tokens_per_s=200.0, tflops_per_rank=1.0)


@pytest.fixture
def blend(tmp_path: Path) -> Any:
    """60 % of a corpus of 31 samples, 40 % of one of 15, for 40 samples."""
    for name, count in (("a", 20), ("b", 10)):
        tokens = np.random.default_rng(0).integers(0, 60, 50 * count).astype("<u2")
        tokens.tofile(tmp_path / f"{name}.bin")
        write_index(tmp_path / f"{name}.idx", tokens.dtype, [50] * count, range(count + 1))
    sources = [str(tmp_path / name) for name in ("a", "b")]
    order = Order(40, 1234, True)
    shared = ("indexed", Causal(), sources, 32, 61)
    return open_dataset(*shared, cache_dir=str(tmp_path / "cache"), weights=[0.6, 0.4], order=order)


def test_the_account_is_written_whole_and_told_at_last(
    make_run: Callable[..., RunConfig], tmp_path: Path, blend: Any
) -> None:
    run, listener = make_run(), Listener()
    file = Path(run.output) / "data.json"
    file.parent.mkdir(parents=True)
    file.write_text("of an earlier run")
    with RunOutput(run, listener, is_first=True) as output:
        output.start(SUMMARY)
        assert not file.exists()
        output.write_usage(blend, 10)
        assert json.loads(file.read_text()) == {
            "samples": 10,
            "sources": [
                {"name": str(tmp_path / "a"), "weight": 0.6, "samples": 6, "epochs": 6 / 31},
                {"name": str(tmp_path / "b"), "weight": 0.4, "samples": 4, "epochs": 4 / 15},
            ],
        }
        assert listener.notes == []
        output.write_usage(blend, 40, is_last=True)
        assert json.loads(file.read_text())["sources"][1]["samples"] == 16
    assert [path.name for path in file.parent.iterdir() if "data" in path.name] == ["data.json"]
    (note,) = listener.notes
    assert note == (
        f"data: {tmp_path / 'a'}: 24 samples (0.60, wanted 0.60), 0.77 epochs; "
        f"{tmp_path / 'b'}: 16 samples (0.40, wanted 0.40), 1.07 epochs"
    )
    with RunOutput(run, listener, is_first=True) as output:
        output.start(SUMMARY, continue_after=1)
        assert file.exists(), "a run that goes on has it still"


def test_other_ranks_write_nothing_and_so_do_data_without_an_account(
    make_run: Callable[..., RunConfig], blend: Any
) -> None:
    run, listener = make_run(), Listener()
    with RunOutput(run, listener, is_first=False) as output:
        output.start(SUMMARY)
        output.write_usage(blend, 10, is_last=True)
    assert not Path(run.output).exists()
    with RunOutput(run, listener, is_first=True) as output:
        output.start(SUMMARY)
        output.write_usage(SimpleNamespace(), 10, is_last=True)  # type: ignore[arg-type]
    assert not (Path(run.output) / "data.json").exists() and listener.notes == []


def test_one_corpus_has_no_share_to_tell() -> None:
    assert describe_usage([SourceUsage("corpus", 1.0, 6120, 0.431)]) == "data: corpus: 6,120 samples, 0.43 epochs"


def test_a_run_accounts_at_each_save_and_at_its_end(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    run = make_run(train={"steps": 4}, checkpoint={"every": 2})
    monkeypatch.setattr(
        RunOutput, "write_usage", lambda self, data, samples, is_last=False: told.append((samples, is_last))
    )
    engine = CountingEngine()
    engine.seen = told  # type: ignore[assignment]  # the process that travels gives it back
    monkeypatch.setattr(CountingEngine, "train_step", _plain_step)
    assert travel(run, engine)[0] == [(16, False), (32, False), (32, True)]


def _plain_step(self: CountingEngine, batches: list[Any], lr: float) -> Any:
    from megatron_ds.engine import StepResult

    return StepResult(1.0, 1.0, 1, True)


def test_a_silent_reporter_is_enough(make_run: Callable[..., RunConfig], blend: Any) -> None:
    with RunOutput(make_run(), SilentReporter(), is_first=True) as output:
        output.start(SUMMARY)
        output.write_usage(blend, 10, is_last=True)


def test_a_link_in_the_output_is_replaced_and_not_what_it_leads_to(
    make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run, kept = make_run(), tmp_path / "kept.yaml"
    kept.write_text("by hand: # with comments")
    Path(run.output).mkdir(parents=True)
    (Path(run.output) / "config.yaml").symlink_to(kept)
    with RunOutput(run, Listener(), is_first=True) as output:
        output.start(SUMMARY)
    assert kept.read_text() == "by hand: # with comments"
    assert (Path(run.output) / "config.yaml").read_text() == dump_run(run)


# ---- a full disk -----------------------------------------------------------------------------------------------------


def saved(folder: Path, step: int) -> Saved:
    return Saved(str(folder / f"step_{step:08d}"), step, 10, 0.0, 0.1, 0.2, 0)


def test_a_disk_that_fills_between_saves_ends_nothing_and_loses_nothing(
    corpus: Path, tmp_path: Path, blend: Any
) -> None:
    run = build_run({**run_mapping(corpus, tmp_path / "run"), "monitor": ["csv"]})
    place = Path(run.output)
    (place / "checkpoints").mkdir(parents=True)
    with RunOutput(run, SilentReporter(), is_first=True) as output:
        output.start(SUMMARY)
        with limited_files(1):
            for step in (1, 2):
                output.step(replace(STEP, step=step))
                output.saved(saved(place / "checkpoints", step))
                output.write_usage(blend, 10 * step)
            assert not (place / "metrics.jsonl").read_bytes() and not (place / "data.json").exists()
            for sink in output._sinks:
                sink._waiting.join()  # type: ignore[attr-defined]  # the tracker's thread writes them meanwhile
            assert not [path.name for path in place.iterdir() if path.name.endswith(".tmp")]
        output.step(replace(STEP, step=3))
        output.saved(saved(place / "checkpoints", 3))
        output.write_usage(blend, 30)
        output.close("title")
        output.finish("done")
    assert [one.step for one in read_metrics(place / "metrics.jsonl")[0]] == [1, 2, 3]
    lines = (place / "checkpoints" / "saves.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert [line.partition(",")[0] for line in (place / "metrics.csv").read_text().splitlines()] == [
        "step",
        "1",
        "2",
        "3",
    ]
    assert json.loads((place / "data.json").read_text())["samples"] == 30
    assert (place / "loss.png").is_file() and (place / "report.html").is_file()


def test_a_disk_that_stays_full_does_not_end_a_run_that_is_done(
    make_run: Callable[..., RunConfig], blend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    with RunOutput(run, SilentReporter(), is_first=True) as output:
        output.start(SUMMARY)
        output.step(STEP)
        with limited_files(1):
            output.step(replace(STEP, step=2))
            output.write_usage(blend, 10, is_last=True)
            output.close("title")
            output.finish("done")
    assert [one.step for one in read_metrics(Path(run.output) / "metrics.jsonl")[0]] == [1]
    words = caplog.text
    assert "metrics.jsonl: 1 lines are lost (File too large)" in words
    assert all(f"{name} could not be written" in words for name in ("data.json", "loss.png", "report.html"))


def test_a_disk_that_is_full_at_the_start_is_told_in_one_line(make_run: Callable[..., RunConfig]) -> None:
    run = make_run()
    with (
        limited_files(1),
        RunOutput(run, SilentReporter(), is_first=True) as output,
        pytest.raises(ConfigError, match=rf"^output={run.output} cannot be written \(File too large\); choose another"),
    ):
        output.start(SUMMARY)


def test_a_run_whose_metrics_wait_for_too_long_saves_and_ends_in_one_line(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(train={"steps": 90}, checkpoint={"every": 1000})
    monkeypatch.setattr(metrics, "MOST_WAITING", 4)
    monkeypatch.setattr(LineFile, "_write", _no_space)
    problem = (
        r"^5 lines of .*metrics.jsonl wait to be written \(No space left on device\); the same command resumes from "
    )
    with pytest.raises(TrainingError, match=problem + "checkpoint step_00000005; make room on that disk$"):
        travel(run, CountingEngine())


def _no_space(self: LineFile, descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
