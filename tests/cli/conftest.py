"""A run file on the tiny corpus, and commands started as a user starts them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ds.config.yaml_text import format_yaml
from tests.forked_python import ForkedPython, can_fork
from tests.training.tiny import run_mapping

MARK = "MEGATRON_DS_TEST"
Running = subprocess.Popen[str] | ForkedPython
Start = Callable[..., "subprocess.Popen[str]"]
Fork = Callable[..., Running]


@pytest.fixture
def run_file(corpus: Path, tmp_path: Path) -> Path:
    """tmp_path/run.yaml, which writes to tmp_path/out."""
    path = tmp_path / "run.yaml"
    path.write_text(format_yaml(run_mapping(corpus, tmp_path / "out")))
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts `python ARGUMENTS` in tmp_path, cold; whatever of it is left at the end is killed."""

    def begin(*arguments: object, **environ: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=_environment(tmp_path, environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    yield begin
    _kill_all(tmp_path)


@pytest.fixture
def fork(tmp_path: Path, start: Start) -> Iterator[Fork]:
    """The same in a fork of this process, which saves the command its imports; see `forked_python`.

    `streams`: descriptors of stdin, stdout and stderr; otherwise `communicate` returns what it writes.
    """
    begun: list[ForkedPython] = []

    def begin(*arguments: object, streams: tuple[int, int, int] | None = None, **environ: str) -> Running:
        full = _environment(tmp_path, environ)
        if not can_fork(full):
            if streams is not None:
                pytest.skip("needs a fork")
            return start(*arguments, **environ)
        begun.append(ForkedPython(arguments, tmp_path, full, streams))
        return begun[-1]

    yield begin
    _kill_all(tmp_path)
    for process in begun:
        process.wait(10)


def _environment(tmp_path: Path, changes: dict[str, str]) -> dict[str, str]:
    """Copy this process's environment, without what launchers, and `quiet_libraries` in it, have set."""
    others = ("SLURM_", "MASTER_", "TRANSFORMERS_", "HF_HUB_DISABLE_", "HF_DATASETS_DISABLE_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return {**clean, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", MARK: str(tmp_path), **changes}


def _kill_all(folder: Path) -> None:
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(folder: Path) -> dict[int, dict[str, str]]:
    """Pid -> environment of the running processes that a test has started in `folder`, in whatever session they are.

    A fork's environment is the one that the forking process began with: it is known by its working directory.
    """
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal() and int(directory.name) != os.getpid():
            try:
                entries = (directory / "environ").read_text().split("\0")
                place = os.readlink(directory / "cwd")
            except (OSError, UnicodeDecodeError):
                continue  # gone, or not ours
            environ = dict(entry.partition("=")[::2] for entry in entries)
            if environ.get(MARK) == str(folder) or place == str(folder):
                found[int(directory.name)] = environ
    return found


def wait_until(condition: Callable[[], bool], within_s: float) -> None:
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"not within {within_s:g} s"
        time.sleep(0.1)


def wait_for_steps(output: Path, steps: int, process: Running, within_s: float = 90.0) -> None:
    """Until so many steps are logged."""
    metrics = output / "metrics.jsonl"

    def logged() -> bool:
        assert process.poll() is None, process.communicate()
        return metrics.is_file() and metrics.read_text().count("\n") >= steps

    wait_until(logged, within_s)
