"""Run the parts of a command, each in a process of its own, within the time limit; then write the report.

The next part is started while one runs, so that its imports take no time of their own; it uses the device when it is
its turn (`record.wait_for_turn`). The standard library alone: packages may have to be installed first.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.gpu.commands import COMMANDS, ENVIRONMENT, Command
from bench.gpu.page import PLAIN
from bench.gpu.part import Part
from bench.gpu.wheels import WHEELS, install_missing, missing

ROOT = Path(__file__).resolve().parents[2]
LAST_S = 10.0  # a part is not started with less time than this left
REPORT_S = 8.0  # kept for the report
TINY_SLOWNESS = 6.0  # limits on a CPU, relative to those on a GPU
NUM_LINES = 6  # of a failed part's log, in its result


def run_command(name: str, selected: Sequence[str] = ()) -> int:
    """Run a command and return its exit status: 0, 1 if a result is wrong, 2 if it cannot run.

    Args:
        name: "check" or "bench".
        selected: names of parts; none = all of them.
    """
    command = COMMANDS[name]
    unknown = [one for one in selected if one not in [part.name for part in command.parts]]
    if unknown:
        sys.stderr.write(f"unknown part {unknown[0]}; parts: {', '.join(part.name for part in command.parts)}\n")
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "out" / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = out / f"{name}.jsonl"
    results.unlink(missing_ok=True)
    began_s = time.time()
    environment = _environment(out, results, began_s)
    run = Run(command, out, results, environment, began_s + _limit_s(command))
    parts = [part for part in command.parts if not selected or part.name in selected or part is ENVIRONMENT]
    try:
        usable = run.parts(parts)
    finally:
        run.write_log(out / f"{name}.log")
    if not usable:
        return 2
    report = [sys.executable, "-m", "bench.gpu.report", command.half, str(results), *(["partial"] if selected else [])]
    return subprocess.run(report, env=environment, cwd=ROOT).returncode


def _limit_s(command: Command) -> float:
    return float(os.environ.get("LIMIT") or command.limit_s * _slowness())


def _slowness() -> float:
    return float(os.environ.get("SLOW") or (TINY_SLOWNESS if os.environ.get("TINY") == "1" else 1.0))


def _environment(out: Path, results: Path, began_s: float) -> dict[str, str]:
    """Return the environment of the parts, in which carried wheels are installed if packages are missing."""
    site = install_missing()
    if site is None and missing():
        sys.stderr.write(
            f"missing, or not of the pinned version, and {WHEELS.relative_to(ROOT)} has no wheels: "
            f"{', '.join(missing())}; try make gpu-wheels on a machine with a network\n"
        )
    path = [str(one) for one in (site, ROOT, os.environ.get("PYTHONPATH")) if one]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # what our runs set; so contestants differ in nothing but their code
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF") or "expandable_segments:True",
        "DEVICE": os.environ.get("DEVICE") or "cuda",
        "DS_ACCELERATOR": os.environ.get("DEVICE") or "cuda",
        "OUT": str(out),
        "GPU_RESULTS": str(results),
        "GPU_BEGAN": str(began_s),
    }


@dataclass
class Started:
    """A part whose process runs."""

    part: Part
    process: subprocess.Popen[str]
    log: Path
    began_s: float = 0.0

    def begin(self) -> None:
        """Let it use the device; its time limit counts from here."""
        assert self.process.stdin is not None
        self.began_s = time.time()
        with suppress(BrokenPipeError):  # it has already ended; `Run` sees why
            self.process.stdin.write("\n")
            self.process.stdin.close()

    def kill(self) -> None:
        """End it with all of its processes."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Run:
    """One run of a command.

    Args:
        command: what runs.
        out: the output directory.
        results: the file of results.
        environment: of the parts.
        end_s: time of the clock at which it ends.
    """

    def __init__(
        self, command: Command, out: Path, results: Path, environment: Mapping[str, str], end_s: float
    ) -> None:
        self.command, self.out, self.results, self.environment = command, out, results, environment
        self.end_s = end_s - REPORT_S
        self._shown, self._section = 0, ""
        self._started: list[Started] = []

    def parts(self, parts: Sequence[Part]) -> bool:
        """Run the parts; returns False if there is no device to run them on."""
        groups = [tuple(members) for _, members in groupby(parts, key=lambda part: part.group or part.name)]
        try:
            started = self._start(groups[0])
            for number in range(len(groups)):
                if self.end_s - time.time() < LAST_S:
                    left = [part.name for group in groups[number:] for part in group]
                    self._failed(groups[number][0], f"no time was left for: {', '.join(left)}")
                    break
                for one in started:
                    one.begin()
                following = self._start(groups[number + 1]) if number + 1 < len(groups) else []
                statuses = [self._finish(one) for one in started]
                self._show_results()
                if number == 0 and statuses[0] == 2:  # the first part finds the device
                    sys.stderr.write(started[0].log.read_text().strip().splitlines()[-1] + "\n")
                    return False
                started = following
        finally:
            for one in self._started:
                one.kill()
            self._show_results()
        return True

    def _start(self, group: Sequence[Part]) -> list[Started]:
        started = [self._start_one(part) for part in group]
        self._started += started
        return started

    def _start_one(self, part: Part) -> Started:
        log = self.out / f".{part.name}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", part.module, *part.arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**self.environment, **part.environment, "GPU_TURN": "1"},
                text=True,
                start_new_session=True,
            )
        return Started(part, process, log)

    def _finish(self, one: Started) -> int:
        end_s = min(one.began_s + one.part.limit_s * _slowness(), self.end_s)
        limit_s = end_s - one.began_s
        try:
            status = one.process.wait(max(1.0, end_s - time.time()))
        except subprocess.TimeoutExpired:
            self._failed(one.part, f"ended at its limit of {limit_s:.0f} s", one.log)
            return 1
        finally:
            one.kill()
        if status != 0 and one.part is not ENVIRONMENT:
            self._failed(one.part, f"status {status}", one.log)
        return status

    def _failed(self, part: Part, reason: str, log: Path | None = None) -> None:
        lines = log.read_text(errors="replace").splitlines()[-NUM_LINES:] if log is not None else []
        row = {"section": "run", "name": part.name, "ok": False, "error": reason, "log": [line[:200] for line in lines]}
        with self.results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _show_results(self) -> None:
        """Print the results that are new, one per line, under the names of their sections."""
        lines = self.results.read_text().splitlines() if self.results.is_file() else []
        for row in map(json.loads, lines[self._shown :]):
            if row["section"] != self._section:
                sys.stdout.write(f"{row['section']}\n")
            sys.stdout.write(f"{summary(row)}\n")
            self._section = row["section"]
        sys.stdout.flush()
        self._shown = len(lines)

    def write_log(self, path: Path) -> None:
        """Join the logs of the parts."""
        with path.open("w") as file:
            for one in self._started:
                file.write(f"==== {one.part.name}\n{one.log.read_text(errors='replace')}\n")
                one.log.unlink()


WIDTH = 160
MARKS = {True: "ok", False: "WRONG", None: ""}


def summary(row: Mapping[str, Any]) -> str:
    """Return a result as a line for the terminal."""
    hidden = (*PLAIN, "kernels")
    figures = [f"{name}={value}" for name, value in row.items() if name not in hidden and value is not None]
    return f"{MARKS[row['ok']]:5} {str(row['name'])[:36]:36} {'  '.join(figures)}"[:WIDTH]
