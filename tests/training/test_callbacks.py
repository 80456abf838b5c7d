"""Callbacks: when they are called, what they read, what they can have a run do, and what their errors do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import megatron_ds as mds
from megatron_ds.config import RunConfig
from megatron_ds.errors import ConfigError, LaunchError
from megatron_ds.training.callbacks import CALLBACKS, Callback, RunState
from tests.ranks import preload

MakeRun = Callable[..., RunConfig]


class Recorder(Callback):
    """Appends (event, step, ...) to a file of each rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self, state: RunState, event: str, *facts: Any) -> None:
        with open(self.folder / f"rank{state.rank}.jsonl", "a") as file:
            file.write(json.dumps([event, state.step, *facts]) + "\n")

    def on_run_start(self, state: RunState) -> None:
        self.record(state, "start", state.metrics is None)

    def on_step_end(self, state: RunState) -> None:
        assert state.metrics is not None and state.applied
        self.record(state, "step", state.metrics.loss, state.metrics.lr)

    def on_validation_end(self, state: RunState) -> None:
        assert state.valid is not None
        self.record(state, "valid", state.valid.step, state.valid.valid_loss)

    def on_checkpoint_saved(self, state: RunState) -> None:
        assert state.saved is not None and Path(state.saved.path).is_dir()
        self.record(state, "saved", state.saved.step)

    def on_run_end(self, state: RunState) -> None:
        self.record(state, "end", state.stopped_by, str(state.exported) if state.exported else None)


def recorded(folder: Path, rank: int = 0) -> list[list[Any]]:
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


def lines_of(run: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]


class At(Callback):
    """Requests something at a step of an event, on one rank."""

    def __init__(self, request: str, step: int, rank: int = 0, event: str = "on_step_end") -> None:
        def call(state: RunState) -> None:
            if state.step == step and state.rank == rank:
                getattr(state, request)()

        setattr(self, event, call)


def test_every_event_is_called_on_every_rank_in_the_same_order(make_run: MakeRun, tmp_path: Path) -> None:
    preload()
    run = make_run(
        checkpoint={"every": 4, "asynchronous": False},
        export={"path": str(tmp_path / "hf")},
        parallel={"tensor": 2},
    )
    mds.train(run, nproc=2, callbacks=[Recorder(tmp_path)])
    first, second = recorded(tmp_path, 0), recorded(tmp_path, 1)
    assert first == second, "loss, gradient norm and events are the same on all ranks"
    lines = lines_of(run)
    steps = [["step", line["step"], line["loss"], line["lr"]] for line in lines if "loss" in line]
    valid = [["valid", line["step"], line["step"], line["valid_loss"]] for line in lines if "valid_loss" in line]
    assert first == [
        ["start", 0, True],
        *steps[:3],
        valid[0],
        steps[3],
        steps[4],
        ["saved", 5, 4],  # found complete when all ranks agree on what comes next
        valid[1],
        ["saved", 5, 5],
        ["end", 5, None, str(tmp_path / "hf")],
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_on_one_rank_stops_all_after_the_step(make_run: MakeRun, tmp_path: Path, rank: int) -> None:
    preload()
    run = make_run(checkpoint={"every": 100})
    result = mds.train(run, nproc=2, callbacks=[Recorder(tmp_path), At("stop", 2, rank)])
    assert result.steps == 2 and result.checkpoint is not None and result.checkpoint.name == "step_00000002"
    assert recorded(tmp_path, 0)[-1] == recorded(tmp_path, 1)[-1] == ["end", 2, "callback At", None]


def test_a_stop_after_a_validation_comes_before_the_next_step(make_run: MakeRun) -> None:
    preload()
    run = make_run(checkpoint={"every": 100})
    assert mds.train(run, nproc=2, callbacks=[At("stop", 3, 1, "on_validation_end")]).steps == 3
    assert mds.train(run, callbacks=[At("stop", 3, 0, "on_run_start")]).steps == 4, "at the end of its first step"


def test_a_checkpoint_and_a_validation_at_request(make_run: MakeRun, tmp_path: Path) -> None:
    preload()
    run = make_run(checkpoint={"every": 100, "keep": 9})
    asked = [At("save", 2, 1), At("validate", 1, 1), At("save", 3, 0, "on_validation_end"), At("validate", 3)]
    mds.train(run, nproc=2, callbacks=[Recorder(tmp_path), *asked])
    checkpoints = sorted(path.name for path in (Path(run.output) / "checkpoints").glob("step_*"))
    assert checkpoints == ["step_00000002", "step_00000003", "step_00000005"]
    assert [line["step"] for line in lines_of(run) if "valid_loss" in line] == [1, 3, 5], "one at step 3, not two"
    assert [one[1] for one in recorded(tmp_path) if one[0] == "valid"] == [1, 3, 5]


def test_callbacks_change_no_number_of_a_run(make_run: MakeRun, tmp_path: Path) -> None:
    preload()
    plain, watched = make_run("plain"), make_run("watched")
    mds.train(plain, nproc=2)
    mds.train(watched, nproc=2, callbacks=[Recorder(tmp_path), At("validate", 2)])
    numbers = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(run) if "loss" in line]
        for run in (plain, watched)
    ]
    assert numbers[0] == numbers[1]


class LossSum(Callback):
    """Logs a number that needs all ranks."""

    def on_step_end(self, state: RunState) -> None:
        import torch

        total = torch.tensor(float(state.rank + 1))
        dist.all_reduce(total)
        state.log(ranks=float(total), step_twice=0.0)
        state.log(step_twice=2.0 * state.step)


def test_logged_numbers_are_in_the_next_logged_line(make_run: MakeRun) -> None:
    preload()
    run = make_run(train={"log_every": 2})
    mds.train(run, nproc=2, callbacks=[LossSum()])
    found = {line["step"]: line["metrics"] for line in lines_of(run) if "loss" in line}
    assert found == {step: {"ranks": 3.0, "step_twice": 2.0 * step} for step in (1, 2, 4, 5)}


class Broken(Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_end(self, state: RunState) -> None:
        if state.rank == self.rank and state.step == 2:
            raise ZeroDivisionError("in a callback")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_ends_the_run_with_its_traceback(make_run: MakeRun, rank: int) -> None:
    preload()
    with pytest.raises(LaunchError) as caught:
        mds.train(make_run(parallel={"tensor": 2}), nproc=2, callbacks=[Broken(rank)])
    text = str(caught.value)
    assert f"rank {rank}" in text and "ZeroDivisionError: in a callback" in text and "test_callbacks.py" in text


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("save", "checkpoint.every=0 saves nothing, and a callback requests a checkpoint; try checkpoint.every=1000"),
        ("validate", "data.valid is empty, and a callback requests a validation; name at least one file"),
    ],
)
def test_a_request_that_the_run_cannot_carry_out_is_refused(make_run: MakeRun, request_: str, message: str) -> None:
    preload()
    with pytest.raises(ConfigError) as caught:
        mds.train(make_run(data={"valid": []}), callbacks=[At(request_, 1)])
    assert str(caught.value) == message


class StopBelow(Callback):
    def __init__(self, loss: float, *, note: str = "") -> None:
        self.loss = loss

    def on_step_end(self, state: RunState) -> None:
        assert state.metrics is not None
        if state.metrics.loss < self.loss:
            state.stop()


def test_a_registered_callback_is_named_in_the_run_file(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    preload()
    monkeypatch.setitem(CALLBACKS._entries, "stop_below", StopBelow)
    run = make_run().model_copy(deep=True)
    run = mds.load_run(_written(run, tmp_path), ["callbacks=[{name: stop_below, loss: 100.0}]"])
    assert mds.train(run).steps == 1
    again = mds.load_run(Path(run.output) / "config.yaml")
    assert again == run and again.callbacks[0].options == {"loss": 100.0}


def _written(run: RunConfig, folder: Path) -> Path:
    from megatron_ds.config import dump_run

    (folder / "run.yaml").write_text(dump_run(run))
    return folder / "run.yaml"
