"""The loop against an engine that only counts: rates, metrics, validation, interrupts, notes."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_ds.checkpoint.progress import Progress
from megatron_ds.config import RunConfig, load_run
from megatron_ds.data import Sample
from megatron_ds.engine import Losses, StepResult
from megatron_ds.errors import TrainingError
from megatron_ds.monitor import RunSummary, SilentReporter, Throughput
from megatron_ds.parallel.grid import Axis
from megatron_ds.train.interrupt import Interrupt
from megatron_ds.train.loop import TrainingLoop
from megatron_ds.train.output import RunOutput
from megatron_ds.train.schedule import learning_rate
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

    device, can_overflow = "cpu", False
    grid = SimpleNamespace(data=Axis(), world=Axis())

    def __init__(self, skipped: Sequence[int] = (), losses: dict[int, float] | None = None) -> None:
        self.skipped, self.losses = skipped, losses or {}
        self.lrs: list[float] = []
        self.on_step: Callable[[int], None] = lambda step: None

    def train_step(self, batches: list[Any], lr: float) -> StepResult:
        self.lrs.append(lr)
        step = len(self.lrs)
        self.on_step(step)
        tokens = sum(int((batch["targets"] != -100).sum()) for batch in batches)
        return StepResult(self.losses.get(step, 1 / 3), 0.1 + 0.2, tokens, step not in self.skipped)

    def evaluate(self, batches: list[Any]) -> Losses:
        labelled = [batch["targets"][batch["targets"] != -100] for batch in batches]
        return Losses((float(sum(int(part.sum()) for part in labelled)),), (sum(part.numel() for part in labelled),))


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def _hear(doing: str, *, may_take_long: bool = False) -> None:
    """What a watchdog is told."""


def drive(run: RunConfig, engine: Any, valid: Numbers | None = None, read_s: float = 0.0) -> Any:
    """(steps done, lines of metrics.jsonl, notes, rates); in a process of its own, since it runs torch."""

    def inside() -> Any:
        listener = Listener()
        with RunOutput(run, listener, is_first=True) as output, Interrupt(run.train.max_time) as interrupt:
            output.start(SUMMARY)
            data: Any = Numbers(20, read_s)
            loop = TrainingLoop(run, engine, data, valid, output, Throughput(1e9, 2), None, Progress(), _hear)
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
    run = make_run(train={"steps": 5, "log_every": 2}, data={"shuffle": False})
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
        ]
        first = (line["step"] - 1) * 8
        assert (line["loss"], line["grad_norm"], line["lr"]) == (1 / 3, 0.1 + 0.2, lrs[line["step"] - 1])
        assert line["tokens"] == sum(index % 20 + 1 for index in range(first, first + 8)), "labels, not positions"
        assert line["step_s"] >= 8 * 0.02, "reading the data counts"
        assert line["tokens_per_s"] == line["tokens"] / line["step_s"]
        assert line["tflops_per_rank"] == pytest.approx(8 * 32 / line["step_s"] * 1e9 / 2 / 1e12), "positions count"


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
        "step 3 was skipped, 1 of train.max_bad_steps=3 in a row: loss nan, gradient norm 0.3",
        "step 4 was skipped, 2 of train.max_bad_steps=3 in a row: loss inf, gradient norm 0.3",
        "step 6 was skipped, 1 of train.max_bad_steps=3 in a row: loss nan, gradient norm 0.3",
        "step 7 was skipped, 2 of train.max_bad_steps=3 in a row: loss 0.333333, gradient norm 0.3",
    ]
    assert lines[1]["loss"] is None and lines[1]["non_finite"] == ["loss"]


def test_too_many_of_them_in_a_row_end_the_run(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(train={"steps": 9, "max_bad_steps": 3})
    engine = CountingEngine(skipped=(2, 4, 5, 6), losses=dict.fromkeys((2, 4, 5, 6), math.nan))
    with pytest.raises(
        TrainingError, match=r"^train.max_bad_steps=3 steps in a row had no finite .* step 6 \(loss nan"
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
        with Interrupt() as interrupt:
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
