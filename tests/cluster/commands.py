"""Commands on machines: forks of this process as ranks, and launchers that are started cold."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.machines import Machine
from tests.forked_python import ForkedPython

_POLL_S = 0.02
_OF_LAUNCHERS = (
    "SLURM_",
    "MASTER_",
    "TRANSFORMERS_",
    "HF_HUB_DISABLE_",
    "HF_DATASETS_DISABLE_",
    "PYTEST_",
    "TORCHELASTIC_",
)


@dataclass
class Command:
    """A command that was started on a machine.

    Attributes:
        name: for messages.
        machine: where it runs.
        log: the file that has what it writes to both streams.
        process: it leads a session of its own.
        begun_s: when it was started, by the monotonic clock.
    """

    name: str
    machine: Machine
    log: Path
    process: ForkedPython | subprocess.Popen[bytes]
    begun_s: float

    @property
    def status(self) -> int | None:
        """Its exit status, minus the number of the signal that ended it, or None while it runs."""
        return self.process.poll()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def descendants(self) -> list[int]:
        """Pids of the processes that it has started, and that these have started, while it runs."""
        found, waiting = [], [self.process.pid]
        while waiting:
            pid = waiting.pop()
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                continue
            waiting += map(int, children)
            found += map(int, children)
        return found

    def kill_all(self) -> None:
        """Kill it and what it has started, the parents first, so that none can respond to the end of another."""
        for pid in (self.process.pid, *self.descendants()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Job:
    """Commands that make one job."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self.commands = list(commands)

    def __getitem__(self, index: int) -> Command:
        return self.commands[index]

    @property
    def statuses(self) -> list[int | None]:
        return [one.status for one in self.commands]

    @property
    def text(self) -> str:
        return "\n".join(
            f"---- {one.name} on {one.machine.name}, status {one.status}\n{one.text}" for one in self.commands
        )

    def wait(self, limit_s: float, which: Sequence[int] | None = None) -> list[int | None]:
        """Wait for the end of its commands, or of some of them; return their statuses, None of one that still runs."""
        waited = self.commands if which is None else [self.commands[index] for index in which]
        until = time.monotonic() + limit_s
        while time.monotonic() < until and any(one.status is None for one in waited):
            time.sleep(_POLL_S)
        return [one.status for one in waited]

    def wait_until(self, condition: Callable[[], bool], limit_s: float = 120.0) -> None:
        """Wait for a condition while its commands run.

        Raises:
            AssertionError: one of them ended before it held, or it did not come to hold in the time.
        """
        until = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < until, f"not within {limit_s:g} s\n{self.text}"
            assert None in self.statuses, f"the job ended first\n{self.text}"
            time.sleep(_POLL_S)

    def end(self) -> None:
        """Kill what still runs of it."""
        for one in self.commands:
            one.kill_all()
            one.process.wait()


def environment(changes: Mapping[str, str], home: Path) -> dict[str, str]:
    """Copy this process's environment without what launchers have set, and with a home of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    root = str(Path(__file__).parents[2])
    fixed = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    fixed["PATH"] = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {**clean, **fixed, "DS_ACCELERATOR": "cpu", "PYTHONDONTWRITEBYTECODE": "1", **changes}


def start_fork(
    machine: Machine,
    name: str,
    arguments: Sequence[object],
    folder: Path,
    prepare: Callable[[], None] | None = None,
    **environ: str,
) -> Command:
    """Start `python ARGUMENTS` on a machine, as a fork of this process in which `prepare` has been called."""
    log = _new_log(folder, name)

    def begin() -> None:
        machine.enter()
        if prepare is not None:
            prepare()

    with open(log, "w") as file, open(os.devnull) as nothing:
        streams = (nothing.fileno(), file.fileno(), file.fileno())
        full = environment(environ, folder)
        process = ForkedPython(arguments, folder, full, streams, prepare=begin)
    return Command(name, machine, log, process, time.monotonic())


def start_cold(
    machine: Machine, name: str, arguments: Sequence[object], cwd: Path, folder: Path, **environ: str
) -> Command:
    """Start any command on a machine, in a directory; its log and its home are in another."""
    log = _new_log(folder, name)

    def enter() -> None:
        machine.enter()
        os.chdir(cwd)

    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(word) for word in arguments],
            env=environment(environ, folder),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=enter,
            start_new_session=True,
        )
    return Command(name, machine, log, process, time.monotonic())


def rank_pid(machine: Machine, variable: str) -> int | None:
    """Return the pid of the rank on a machine whose environment has a variable, such as `RANK=1`; None if none runs."""
    found = []
    for pid in machine.processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if words[1:4] in ([b"-m", b"megatron_ds", b"train"], [b"-u", b"-m", b"megatron_ds"]):
                found += [pid] if variable.encode() in variables else []
    return min(found, default=None)


def _new_log(folder: Path, name: str) -> Path:
    number = len(list(folder.glob(f"{name}.*.log")))
    return folder / f"{name}.{number}.log"


def records(output: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl; none if there is no such file yet."""
    file = output / "metrics.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(output: Path) -> dict[str, float]:
    """Return each loss of metrics.jsonl by its kind and step, such as `loss 3` and `valid_loss 4`."""
    kinds = ("loss", "valid_loss")
    return {f"{kind} {line['step']}": line[kind] for line in records(output) for kind in kinds if kind in line}


def steps_done(output: Path) -> int:
    return max((line["step"] for line in records(output)), default=0)


def difference(found: Mapping[str, float], expected: Mapping[str, float]) -> float:
    """Return the largest relative difference of the same losses."""
    assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
    return max(abs(found[key] / expected[key] - 1) for key in expected)
