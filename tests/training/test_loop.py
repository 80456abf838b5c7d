"""The loop against an engine that only counts: rates, metrics, validation, interrupts, notes."""

import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ds.checkpoint.progress import Progress
from megatron_ds.config import RunConfig, load_run
from megatron_ds.data import GlobalBatches, Sample
from megatron_ds.engine import Losses, StepResult
from megatron_ds.errors import DataError, TrainingError
from megatron_ds.monitor import RunSummary, SilentReporter, Throughput
from megatron_ds.parallel.grid import Axis
from megatron_ds.training.graceful_stop import GracefulStop
from megatron_ds.training.loop import TrainingLoop
from megatron_ds.training.lr_schedule import learning_rate
from megatron_ds.training.run_output import RunOutput
from tests.ranks import run_alone

SUMMARY = RunSummary("llama", 1, 1, 1, 1, 1, False, 1, "fp32", "cpu", 1, 1, "data", "out")


class Numbers:
    """Sample i is all i, with i + 1 labels."""

    seq_length, target_length, columns, fingerprint, ordered = 32, None, ("input_ids", "targets"), "", False

    def __init__(self, size: int, read_s: float = 0.0) -> None:
        self.size, self.read_s = size, read_s

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> Sample:
        time.sleep(self.read_s)
        targets = np.full(32, -100, dtype=np.int64)
        index %= self.size
        targets[: index + 1] = index
        return {"input_ids": np.full(32, index, dtype=np.int64), "targets": targets}

    def blank(self) -> Sample:
        return {"input_ids": np.zeros(32, dtype=np.int64), "targets": np.full(32, -100, dtype=np.int64)}

    def describe(self) -> str:
        return "numbers"


class CountingEngine:
    """Every token's loss is its target; step k (1-based) is applied unless k is in `skipped`."""

    device, can_overflow = torch.device("cpu"), False
    grid = SimpleNamespace(rank=0, batch=Axis(), world=Axis(), host=Axis())

    def __init__(
        self, skipped: Sequence[int] = (), losses: dict[int, float] | None = None, step_s: float = 0.0
    ) -> None:
        self.skipped, self.losses, self.step_s = skipped, losses or {}, step_s
        self.lrs: list[float] = []
        self.seen: list[list[int]] = []
        self.on_step: Callable[[int], None] = lambda step: None

    def train_step(self, batches: list[Any], lr: float) -> StepResult:
        self.lrs.append(lr)
        step = len(self.lrs)
        self.on_step(step)
        time.sleep(self.step_s)
        self.seen.append([int(number) for batch in batches for number in batch["input_ids"][:, 0]])
        tokens = sum(int((batch["targets"] != -100).sum()) for batch in batches)
        return StepResult(self.losses.get(step, 1 / 3), 0.1 + 0.2, tokens, step not in self.skipped)

    def evaluate(self, batches: list[Any]) -> Losses:
        labelled = [batch["targets"][batch["targets"] != -100] for batch in batches]
        total, count = float(sum(int(part.sum()) for part in labelled)), sum(part.numel() for part in labelled)
        return Losses({"targets": total}, {"targets": count})


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def _hear(doing: str, *, may_take_long: bool = False) -> None:
    """What a watchdog is told."""


class KeepingSaver:
    """Keeps what it was to save."""

    is_due = False

    def __init__(self) -> None:
        self.saved: list[Progress] = []

    def save(self, progress: Progress) -> None:
        self.saved.append(progress)

    def wait(self) -> None:
        pass

    def finish(self, tell: Any) -> list[Any]:
        return []


def travel(run: RunConfig, engine: Any, begin: Progress = Progress(), read_s: float = 0.0) -> Any:  # noqa: B008
    """(samples of each step, positions saved, what the watchdog was told); in a process of its own."""

    def inside() -> Any:
        saver: Any = KeepingSaver()
        heard: list[str] = []
        with RunOutput(run, SilentReporter(), is_first=True) as output, GracefulStop() as interrupt:
            output.start(SUMMARY)
            data: Any = Numbers(20, read_s)

            def hear(doing: str, *, may_take_long: bool = False) -> None:
                heard.append(doing)

            loop = TrainingLoop(run, engine, data, None, output, Throughput(1e9, 2), saver, begin, hear)
            loop.run(interrupt)
        return engine.seen, saver.saved, heard

    return run_alone(inside)


def drive(
    run: RunConfig,
    engine: Any,
    valid: Numbers | None = None,
    read_s: float = 0.0,
    peak_flops: float | None = None,
) -> Any:
    """(steps done, lines of metrics.jsonl, notes, rates); in a process of its own, since it runs torch."""

    def inside() -> Any:
        listener = Listener()
        with RunOutput(run, listener, is_first=True) as output, GracefulStop(run.train.max_time) as interrupt:
            output.start(SUMMARY)
            data: Any = Numbers(20, read_s)
            speed = Throughput(1e9, 2, peak_flops)
            loop = TrainingLoop(run, engine, data, valid, output, speed, None, Progress(), _hear)
            done = loop.run(interrupt)
            output.close("numbers")
        return done, listener.notes, engine.lrs

    done, notes, lrs = run_alone(inside)
    lines = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    return done, lines, notes, lrs


def test_the_rate_does_not_advance_on_a_step_that_was_not_applied(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"steps": 6})
    _, _, _, lrs = drive(run, CountingEngine(skipped=(1, 2, 4)))
    expected = [learning_rate(applied, 6, run.optimizer, run.schedule) for applied in (0, 0, 0, 1, 1, 2)]
    assert lrs == expected


def test_metrics_are_whole(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"steps": 5, "log_every": 2}, data={"shuffle": False, "prefetch": 0})
    done, lines, notes, lrs = drive(run, CountingEngine(), read_s=0.02)
    assert done == 5 and notes == []
    assert [line["step"] for line in lines] == [1, 2, 4, 5]
    for line in lines:
        assert list(line) == [
            "step",
            "loss",
            "grad_norm",
            "lr",
            "tokens",
            "step_s",
            "tokens_per_s",
            "tflops_per_rank",
            "data_s",
            "peak_memory_bytes",
        ]
        first = (line["step"] - 1) * 8
        assert (line["loss"], line["grad_norm"], line["lr"]) == (1 / 3, 0.1 + 0.2, lrs[line["step"] - 1])
        assert line["tokens"] == sum(index % 20 + 1 for index in range(first, first + 8)), "labels, not positions"
        assert line["step_s"] >= line["data_s"] >= 8 * 0.02, "reading the data counts"
        assert line["tokens_per_s"] == line["tokens"] / line["step_s"]
        assert line["tflops_per_rank"] == pytest.approx(8 * 32 / line["step_s"] * 1e9 / 2 / 1e12), "positions count"
        assert 2**24 < line["peak_memory_bytes"] < 2**40, "bytes of a process with torch in it"


def test_mfu_stands_there_where_the_peak_is_known(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"steps": 3})
    _, lines, _, _ = drive(run, CountingEngine(), peak_flops=2e9)
    assert all(line["mfu"] == pytest.approx(line["tflops_per_rank"] * 1e12 / 2e9, rel=1e-12) for line in lines)


def test_the_end_of_a_run_names_its_peak_memory_and_the_mfu_of_its_median_step(
    make_run: Callable[..., RunConfig],
) -> None:
    run = make_run(train={"steps": 3})

    def inside() -> str:
        with RunOutput(run, SilentReporter(), is_first=True) as output, GracefulStop() as interrupt:
            output.start(SUMMARY)
            data: Any = Numbers(20)
            engine: Any = CountingEngine()
            loop = TrainingLoop(run, engine, data, None, output, Throughput(1e9, 2, 1e15), None, Progress(), _hear)
            loop.run(interrupt)
            return loop.describe_use()

    text = run_alone(inside)
    lines = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    found = re.fullmatch(r"peak memory (\d+\.\d\d) GB; MFU (\d+\.\d)% \(median of the steps\)", text)
    assert found is not None, text
    assert float(found[1]) >= round(lines[-1]["peak_memory_bytes"] / 1e9, 2)
    assert float(found[2]) == pytest.approx(100 * sorted(line["mfu"] for line in lines)[1], abs=0.051)


def test_validation_covers_every_sample_once_and_weighs_tokens(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"steps": 5, "eval_every": 2})
    _, lines, _, _ = drive(run, CountingEngine(), Numbers(11))
    valid = [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in valid] == [2, 4, 5], "the last step too"
    weights = np.arange(1, 12)
    assert valid[0]["valid_loss"] == pytest.approx(float((np.arange(11) * weights).sum() / weights.sum()), rel=1e-15)


def test_a_step_that_is_not_finite_is_told_and_a_few_in_a_row_do_not_end_the_run(
    make_run: Callable[..., RunConfig],
) -> None:
    run = make_run(train={"steps": 8, "log_every": 4, "max_bad_steps": 3})
    engine = CountingEngine(skipped=(3, 4, 6, 7), losses={3: math.nan, 4: math.inf, 6: math.nan})
    done, lines, notes, _ = drive(run, engine)
    assert done == 8
    assert notes == [
        "skipped step 3 (1 consecutive, train.max_bad_steps=3): loss nan, gradient norm 0.3",
        "skipped step 4 (2 consecutive, train.max_bad_steps=3): loss inf, gradient norm 0.3",
        "skipped step 6 (1 consecutive, train.max_bad_steps=3): loss nan, gradient norm 0.3",
        "skipped step 7 (2 consecutive, train.max_bad_steps=3): loss 0.333333, gradient norm 0.3",
    ]
    assert lines[1]["loss"] is None and lines[1]["non_finite"] == ["loss"]


def test_too_many_of_them_in_a_row_end_the_run(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"steps": 9, "max_bad_steps": 3})
    engine = CountingEngine(skipped=(2, 4, 5, 6), losses=dict.fromkeys((2, 4, 5, 6), math.nan))
    with pytest.raises(
        TrainingError, match=r"^train.max_bad_steps=3: loss or gradient norm was not finite for 3 .* step 6, loss nan"
    ):
        drive(run, engine)
    lines = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_an_overflow_of_fp16_is_in_the_course_of_things(make_run: Callable[..., RunConfig]) -> None:
    engine = CountingEngine(skipped=(1, 2, 3))
    engine.can_overflow = True
    done, _, notes, _ = drive(make_run(train={"steps": 5, "max_bad_steps": 2}), engine)
    assert done == 5 and notes == []


def test_the_clock_ends_the_run_after_the_step(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"steps": 100, "max_time": 0.5})
    done, lines, _, _ = drive(run, CountingEngine(), read_s=0.01)
    assert 2 <= done < 20 and len(lines) == done


def test_an_interrupt_ends_the_run_after_the_step_with_files_closed(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"steps": 6, "eval_every": 0})
    engine = CountingEngine()

    def press_twice_at_once(step: int) -> None:  # as a terminal and torchrun do
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    engine.on_step = press_twice_at_once
    done, lines, _, _ = drive(run, engine)
    assert done == 3 and [line["step"] for line in lines] == [1, 2, 3]
    assert (Path(run.output) / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_run(Path(run.output) / "config.yaml") == run


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM)],
)
def test_a_second_signal_ends_the_process(first: signal.Signals, second: signal.Signals) -> None:
    from megatron_ds.errors import LaunchError
    from megatron_ds.parallel.launch import run_local

    def press_twice(info: Any) -> None:
        with GracefulStop() as interrupt:
            os.kill(os.getpid(), first)
            assert interrupt.requested and interrupt.signal is first
            time.sleep(1.1)
            os.kill(os.getpid(), second)
            time.sleep(5)
            raise AssertionError("still here")

    with pytest.raises((KeyboardInterrupt, LaunchError)) as caught:
        run_local(press_twice, 1)
    if second == signal.SIGINT:
        assert caught.type is KeyboardInterrupt
    else:
        assert str(caught.value) == f"rank 0 ended with exit code {128 + second}"


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_reading_ahead_changes_no_sample_and_what_is_saved_is_what_was_done(
    make_run: Callable[..., RunConfig], ahead: int
) -> None:
    run = make_run(train={"steps": 7}, data={"prefetch": ahead}, checkpoint={"every": 3})
    seen, saved, heard = travel(run, CountingEngine())
    order = GlobalBatches(20, 8, run.train.seed, shuffle=True)
    assert seen == [(order.indices(step) % 20).tolist() for step in range(7)]
    assert [(one.step, one.data.samples) for one in saved] == [(3, 24), (6, 48), (7, 56)]
    assert heard[:3] == ["step 1: reading data", "step 1: forward and backward pass, optimizer", "step 2: reading data"]


@pytest.mark.parametrize("ahead", [0, 5])
def test_a_run_that_is_cut_goes_on_with_the_samples_it_would_have_had(
    make_run: Callable[..., RunConfig], ahead: int
) -> None:
    whole, _, _ = travel(make_run("whole", train={"steps": 8}), CountingEngine())
    run = make_run("cut", train={"steps": 8}, data={"prefetch": ahead}, checkpoint={"every": 100})
    engine = CountingEngine(step_s=0.05)  # time to read ahead in
    engine.on_step = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    before, saved, _ = travel(run, engine)
    assert [(one.step, one.data.samples) for one in saved] == [(3, 24)]
    after, _, _ = travel(run, CountingEngine(), saved[0])
    assert before + after == whole and len(before) == 3


def test_groups_with_a_rate_of_their_own_are_logged_by_their_patterns(make_run: Callable[..., RunConfig]) -> None:
    groups = [{"match": "a.*", "lr": 3e-4}, {"match": ["b", "c"], "lr_factor": 2}, {"match": "d", "weight_decay": 0.0}]
    run = make_run(train={"steps": 4}, optimizer={"lr": 3e-3, "groups": groups})
    _, lines, _, lrs = drive(run, CountingEngine())
    for line, lr in zip(lines, lrs, strict=True):
        assert line["lr"] == lr and line["lrs"] == pytest.approx({"a.*": 0.1 * lr, "b, c": 2 * lr}, rel=1e-12)


RAMP = {"global_batch_size": 8, "batch_ramp": {"start": 2, "increment": 2, "samples": 12}}


def test_a_batch_ramp_reads_every_sample_once_and_notes_each_size(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"steps": 7, **RAMP}, data={"shuffle": False})
    engine = CountingEngine()
    done, lines, notes, _ = drive(run, engine)
    sizes = [2, 2, 4, 6, 8, 8, 8]
    assert done == 7 and [line["samples"] for line in lines] == sizes
    begins = [sum(sizes[:step]) for step in range(7)]
    labels = [sum(index % 20 + 1 for index in range(begin, begin + size)) for begin, size in zip(begins, sizes)]
    assert [line["tokens"] for line in lines] == labels
    positions = [line["tflops_per_rank"] * line["step_s"] / (1e9 / 2 / 1e12) for line in lines]
    assert positions == pytest.approx([size * 32 for size in sizes])
    assert notes == [
        f"step {step}: global batches of {size} samples" for step, size in ((1, 2), (3, 4), (4, 6), (5, 8))
    ]


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_a_ramp_that_is_cut_goes_on_with_its_sizes_and_samples(make_run: Callable[..., RunConfig], cut: int) -> None:
    run = make_run(train={"steps": 7, **RAMP}, checkpoint={"every": cut})
    whole, saved, _ = travel(run, CountingEngine())
    assert [len(seen) for seen in whole] == [2, 2, 4, 6, 8, 8, 8]
    assert saved[0].data.samples == sum(len(seen) for seen in whole[:cut])
    after, _, _ = travel(run, CountingEngine(), saved[0])
    assert after == whole[cut:]


def test_a_step_hides_the_reading_of_the_next(make_run: Callable[..., RunConfig]) -> None:
    waits = {}
    for ahead in (0, 2):
        run = make_run(f"ahead{ahead}", train={"steps": 8}, data={"prefetch": ahead})
        _, lines, _, _ = drive(run, CountingEngine(step_s=0.2), read_s=0.01)
        waits[ahead] = [line["data_s"] for line in lines]
        assert waits[ahead][0] >= 0.08, "the first step has nothing to hide it behind"
    assert min(waits[0]) >= 0.08
    assert sorted(waits[2][1:])[3] < 0.01, waits


def test_steps_that_wait_for_data_are_told_of_once(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"steps": 70, "log_every": 70})
    _, lines, notes, _ = drive(run, CountingEngine(), read_s=0.001)
    assert len(notes) == 1 and notes[0].startswith("steps wait for data: 0.0")
    assert notes[0].endswith("put the data on faster storage, or raise data.prefetch where reading is uneven")
    assert [line["step"] for line in lines] == [1, 70]


def test_data_that_cannot_be_read_end_the_run_at_the_step_that_needs_them(make_run: Callable[..., RunConfig]) -> None:
    engine = CountingEngine(step_s=0.05)

    class Broken(Numbers):
        def sample(self, index: int) -> Sample:
            if index >= 16:
                raise DataError("data: corpus: holds the id 99")
            return super().sample(index)

    run = make_run(train={"steps": 6}, data={"prefetch": 5, "shuffle": False})

    def inside() -> Any:
        with RunOutput(run, SilentReporter(), is_first=True) as output, GracefulStop() as interrupt:
            output.start(SUMMARY)
            data: Any = Broken(20)
            loop = TrainingLoop(run, engine, data, None, output, Throughput(1e9, 2), None, Progress(), _hear)
            with pytest.raises(DataError, match=r"^data: corpus: holds the id 99$"):
                loop.run(interrupt)
        return len(engine.seen)

    assert run_alone(inside) == 2
