"""Run the contestants of a case: start all of them, warm up, then alternate their turns over several rounds."""

from __future__ import annotations

import json
import os
import selectors
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.work import Spec

WARM_UPS = 1
TIMEOUT_S = 600.0  # limit of a start and of a turn


class ContestantError(RuntimeError):
    """A contestant exited or timed out; the message ends with the last lines of its log."""


@dataclass
class Samples:
    """Measurements of one contestant.

    Attributes:
        seconds: duration of a step, one per round.
        losses: losses of the first steps and of the last step of each turn.
        peak_bytes: peak memory of its largest rank; None before the first turn.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def compete(specs: dict[str, Spec], rounds: int, steps: int, folder: Path) -> dict[str, Samples]:
    """Run all contestants and return their measurements by label.

    Args:
        specs: the contestants.
        rounds: number of turns of each contestant.
        steps: steps per turn.
        folder: directory for logs.

    Raises:
        ContestantError: one of them failed.
    """
    found = {label: Samples() for label in specs}
    with ExitStack() as stack:
        running = {label: stack.enter_context(_started(label, spec, folder)) for label, spec in specs.items()}
        for contestant in running.values():
            contestant.answer()  # it is ready
        for label, contestant in running.items():
            for _ in range(WARM_UPS):
                found[label].losses.append(contestant.run(1)["loss"])
        for number in range(rounds):
            for label in _turned(list(running), number):
                answer = running[label].run(steps)
                found[label].seconds.append(answer["seconds"] / answer["steps"])
                found[label].losses.append(answer["loss"])
                found[label].peak_bytes = max(answer["peaks"])
    return found


def _turned(labels: Sequence[str], number: int) -> list[str]:
    """Return the labels in the order of their turns; each round starts with another contestant."""
    at = number % len(labels)
    return [*labels[at:], *labels[:at]]


@contextmanager
def _started(label: str, spec: Spec, folder: Path) -> Iterator[_Contestant]:
    name = label.replace(" ", "_").replace("/", "_")
    spec_file, log = folder / f"{name}.json", folder / f"{name}.log"
    spec.write(spec_file)
    cores = len(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": str(max(1, cores // spec.world)), "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **threads, **spec.environment}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.contestant", str(spec_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        )
        try:
            yield _Contestant(label, process, log)
        finally:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has already exited
                process.stdin.close()  # it exits at the end of its input
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()  # its ranks exit with it
                process.wait()


@dataclass
class _Contestant:
    label: str
    process: subprocess.Popen[str]
    log: Path

    def run(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("ended") from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT_S):
                raise self._failed(f"did not answer for {TIMEOUT_S:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._failed("ended")
        return json.loads(line)

    def _failed(self, what: str) -> ContestantError:
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        return ContestantError(f"{self.label} {what}; the end of {self.log}:\n{end}")
