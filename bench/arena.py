"""Contestants of a case start together, warm up, and then take turns, round after round."""

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
TIMEOUT_S = 600.0  # of a start, and of a turn


class ContestantError(RuntimeError):
    """A contestant ended, or said nothing for too long; with the end of what it logged."""


@dataclass
class Samples:
    """What one contestant did.

    Attributes:
        seconds: of a step, a round each.
        losses: of the first steps, and of the last of each turn.
        peak_bytes: the most that any of its ranks held; None where nothing is held.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def compete(specs: dict[str, Spec], rounds: int, steps: int, folder: Path) -> dict[str, Samples]:
    """Every contestant by its label.

    Args:
        specs: the contestants.
        rounds: turns of each.
        steps: of a turn.
        folder: for logs.

    Raises:
        ContestantError: one of them failed.
    """
    found = {label: Samples() for label in specs}
    with ExitStack() as stack:
        running = {label: stack.enter_context(_started(label, spec, folder)) for label, spec in specs.items()}
        for contestant in running.values():
            contestant.answer()  # that it is ready
        for label, contestant in running.items():
            for _ in range(WARM_UPS):
                found[label].losses.append(contestant.run(1)["loss"])
        for number in range(rounds):
            for label in _turned(list(running), number):
                told = running[label].run(steps)
                found[label].seconds.append(told["seconds"] / told["steps"])
                found[label].losses.append(told["loss"])
                found[label].peak_bytes = max(told["peaks"])
    return found


def _turned(labels: Sequence[str], number: int) -> list[str]:
    """Each round begins with another."""
    at = number % len(labels)
    return [*labels[at:], *labels[:at]]


@contextmanager
def _started(label: str, spec: Spec, folder: Path) -> Iterator[_Contestant]:
    name = label.replace(" ", "_").replace("/", "_")
    told, log = folder / f"{name}.json", folder / f"{name}.log"
    spec.write(told)
    cores = len(os.sched_getaffinity(0))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // spec.world)), "PYTHONWARNINGS": "ignore"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.contestant", str(told)],
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
            with suppress(BrokenPipeError):  # of one that has ended already
                process.stdin.close()  # no more numbers: it ends by itself
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()  # its ranks end with it
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
                raise self._failed(f"said nothing for {TIMEOUT_S:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._failed("ended")
        return json.loads(line)

    def _failed(self, what: str) -> ContestantError:
        end = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        return ContestantError(f"{self.label} {what}; the end of {self.log}:\n{end}")
