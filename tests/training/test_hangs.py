"""A rank that stops anywhere in a run ends it with its name; slow storage and a slow first step do not."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from _pytest.monkeypatch import MonkeyPatch

from megatron_ds.checkpoint import saver
from megatron_ds.config import RunConfig, dump_run
from megatron_ds.engine import Engine
from megatron_ds.errors import LaunchError
from megatron_ds.parallel import launch, section_limits
from megatron_ds.parallel import watchdog as watchdog_module
from megatron_ds.training import worker
from megatron_ds.training.launch import train
from tests.forked_python import ForkedPython
from tests.ranks import preload

TIMEOUT_S = 0.5


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: MonkeyPatch) -> None:
    preload()
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    monkeypatch.setattr(section_limits, "SHORTEST_S", 1.0)
    monkeypatch.setattr(watchdog_module, "SHORTEST_SILENCE_S", 2.0)


@contextmanager
def on_rank_1(
    act: Callable[[], None], owner: Any, name: str, monkeypatch: MonkeyPatch, call: int = 1
) -> Iterator[None]:
    """Have the second rank act before a call of a function, the first one by default."""
    function, calls = getattr(owner, name), [0]

    def instead(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if os.environ.get("RANK") == "1" and calls[0] == call:
            act()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, instead)
    yield


def stop() -> None:
    time.sleep(0.3)  # its phase is published
    os.kill(os.getpid(), signal.SIGSTOP)


def run_with(make_run: Callable[..., RunConfig], tmp_path: Path, **train_section: Any) -> RunConfig:
    return make_run(
        train={"steps": 4, "eval_every": 0, "step_timeout": TIMEOUT_S, **train_section},
        checkpoint={"every": 2, "asynchronous": False},
        export={"path": str(tmp_path / "hf")},
    )


@pytest.mark.parametrize(
    ("owner", "name", "phase"),
    [
        pytest.param(worker, "start_distributed", "joining the process group", marks=pytest.mark.sweep),
        (worker, "open_data", "reading model and data"),
        pytest.param(worker, "build", "building the model", marks=pytest.mark.sweep),
        pytest.param(Engine, "evaluate", "validation after step 4, batch 1", marks=pytest.mark.sweep),
        pytest.param(saver._Writing, "make_directory", "saving after step 2", marks=pytest.mark.sweep),
        (saver, "write_chunks", "saving after step 2"),
        pytest.param(worker, "export_live", "exporting", marks=pytest.mark.sweep),
    ],
)
def test_a_stopped_rank_is_named_with_its_phase(
    owner: Any, name: str, phase: str, make_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    began = time.monotonic()
    with on_rank_1(stop, owner, name, monkeypatch), pytest.raises(LaunchError) as caught:
        train(run_with(make_run, tmp_path), 2)
    verdict = "rank 1 does not respond: its process or machine is stopped or dead"
    assert f"{verdict}; last phase: {phase}; rank 0 is waiting in: " in str(caught.value)
    assert re.match(r"no (sign of rank 1 for 2|progress for 0.5) s \(train.step_timeout=0.5\); ", str(caught.value))
    assert time.monotonic() - began < 40


def test_a_rank_that_sleeps_in_a_later_save_is_found_by_what_saves_took(
    make_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    with (
        on_rank_1(lambda: time.sleep(100), saver, "write_chunks", monkeypatch, call=2),
        pytest.raises(
            LaunchError, match=r"^no progress of any rank for .* rank 1 is waited for by the others; last ph"
        ),
    ):
        train(run_with(make_run, tmp_path), 2)


def test_slow_storage_and_a_slow_first_step_do_not_end_a_run(
    make_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    flush, compiling = os.fsync, [1.2]

    def slow_flush(descriptor: int) -> None:
        time.sleep(0.15)
        flush(descriptor)

    def slow_start(self: Any, *args: Any) -> Any:
        time.sleep(compiling.pop() if compiling else 0.0)
        return train_step(self, *args)

    train_step = Engine.train_step
    monkeypatch.setattr(os, "fsync", slow_flush)
    monkeypatch.setattr(Engine, "train_step", slow_start)
    assert train(run_with(make_run, tmp_path), 2).steps == 4


# ---- signals before the first step -----------------------------------------------------------------------------------


def _sleep_while_opening_data() -> None:
    """Have the second rank stop, and the others wait for it."""

    def open_data(resolved: Any) -> Any:
        if os.environ["RANK"] == "1":
            Path(os.environ["TMPDIR"], "stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return before(resolved)

    before, worker.open_data = worker.open_data, open_data


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, -signal.SIGTERM),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.sweep),
        pytest.param(signal.SIGUSR1, -signal.SIGUSR1, marks=pytest.mark.sweep),
    ],
)
def test_one_signal_ends_a_run_that_waits_for_a_rank_at_its_start(
    number: int, status: int, make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_run(make_run()))
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    arguments = ("-m", "megatron_ds", "train", file, "--nproc", 2)
    command = ForkedPython(arguments, tmp_path, environ, prepare=_sleep_while_opening_data)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "stopped").exists():
            assert time.monotonic() < until and command.poll() is None, command.communicate(5)
            time.sleep(0.05)
        time.sleep(0.5)  # the others wait in their collective
        command.send_signal(number)
        began = time.monotonic()
        assert command.wait(20) == status
        assert time.monotonic() - began < launch.INTERRUPT_GRACE_S / 4
    finally:
        command.kill()
