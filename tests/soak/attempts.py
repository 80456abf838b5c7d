"""Runs whose processes are killed or stopped at a random moment, and what must hold after each.

A lane trains one output after another. It starts the run, hits it once, waits for its end, checks what is left, and
starts the same command again, until the run is done and equals one that nothing happened to.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint.directory import step_of
from megatron_ds.checkpoint.reader import newest_intact
from megatron_ds.config.yaml_text import format_yaml
from tests.cluster.commands import records, steps_done
from tests.forked_python import ForkedPython, run_python
from tests.training.tiny import run_mapping

STEPS = 12
LONGEST_END_S = 60.0  # from a kill until no process is left; a run that goes on has as long again
_POLL_S = 0.005
LAYOUTS: Mapping[str, dict[str, Any]] = {
    "dp2": {},
    "dp2-zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
    "tp2-sp": {"parallel": {"tensor": 2, "sequence": True}},
    "pp2": {"parallel": {"pipeline": 2}},
}
LAUNCHES = ("one command", "one command with --max-restarts", "a command for each rank")
MOMENTS = ("start or resume", "step", "save", "export")
BLOWS = ("kill a rank", "kill all ranks", "kill the parent", "stop a rank", "suspend all for 2 s")
_CHANCES = (4, 2, 2, 2, 1)  # of the blows


@dataclass
class Attempt:
    """A start of a run, and how it ended.

    Attributes:
        layout, launch, moment, blow: from the lists above.
        is_hit: whether the blow came before the end.
        faults: the rules that were broken, each with its count's name first.
    """

    layout: str
    launch: str
    moment: str
    blow: str
    is_hit: bool = False
    faults: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """A run that nothing happened to: the loss of each step, and a digest of the exported weights."""

    losses: Mapping[int, float]
    weights: str


class Lane:
    """Attempts, one after the other, in a folder of its own.

    Args:
        corpus: from `write_corpus`.
        folder: a new one; no other process may have it as its working directory.
        chance: draws all that is random, except how far the run has come when it is hit.
    """

    def __init__(self, corpus: Path, folder: Path, chance: random.Random) -> None:
        folder.mkdir(parents=True)
        self._corpus, self._folder, self._chance = corpus, folder, chance
        self._references: dict[str, Reference] = {}
        self._start_s = 2.0  # until the first step
        self._begin_output()

    def attempt(self) -> Attempt:
        """Start the run, hit it, and check what must hold."""
        blow = self._chance.choices(BLOWS, _CHANCES)[0]
        attempt = Attempt(self._layout, self._chance.choice(LAUNCHES), self._chance.choice(MOMENTS), blow)
        reference = self._reference(self._layout)
        newest = self._newest()
        commands = self._start(attempt.launch)
        stopped: list[int] = []
        if self._wait_for(attempt.moment, commands):
            stopped = self._hit(attempt, commands)
        self._wait_for_end(attempt, commands, stopped)
        self._check(attempt, commands, reference, newest)
        return attempt

    # ---- the run -----------------------------------------------------------------------------------------------------

    def _begin_output(self) -> None:
        shutil.rmtree(self._folder / "run", ignore_errors=True)
        shutil.rmtree(self._folder / "hf", ignore_errors=True)
        self._layout = self._chance.choice(list(LAYOUTS))
        self._write_run(self._layout, "run", self._chance.random() < 0.5)

    def _write_run(self, layout: str, name: str, is_asynchronous: bool) -> Path:
        mapping = run_mapping(self._corpus, self._folder / name)
        mapping["train"].update(steps=STEPS, eval_every=6, step_timeout=6, start_timeout=20)
        mapping["train"]["max_no_progress_restarts"] = None
        mapping["checkpoint"] = {"every": 3, "keep": 2, "asynchronous": is_asynchronous}
        mapping["export"] = {"path": str(self._folder / ("hf" if name == "run" else f"{name}-hf"))}
        file = self._folder / f"{name}.yaml"
        file.write_text(format_yaml({**mapping, **LAYOUTS[layout]}))
        return file

    def _reference(self, layout: str) -> Reference:
        if layout not in self._references:
            name = f"uncut-{layout}"
            file = self._write_run(layout, name, False)
            run_python("-m", "megatron_ds", "train", file, "--nproc", 2, check=True, cwd=self._folder)
            weights = _digest(self._folder / f"{name}-hf")
            self._references[layout] = Reference(self._losses(self._folder / name), weights)
        return self._references[layout]

    def _start(self, launch: str) -> list[ForkedPython]:
        words: list[object] = ["-m", "megatron_ds", "train", self._folder / "run.yaml"]
        if launch != LAUNCHES[2]:
            options = ["--max-restarts", 20] if launch == LAUNCHES[1] else []
            return [self._fork([*words, "--nproc", 2, *options], {}, "command.log")]
        port = str(self._chance.randrange(20000, 30000))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(2)]
        return [self._fork(words, place, f"rank{place['RANK']}.log") for place in places]

    def _fork(self, words: Sequence[object], environ: Mapping[str, str], log: str) -> ForkedPython:
        with open(self._folder / log, "w") as file, open(os.devnull) as nothing:
            streams = (nothing.fileno(), file.fileno(), file.fileno())
            return ForkedPython(words, self._folder, {**os.environ, **environ}, streams)

    # ---- the blow ----------------------------------------------------------------------------------------------------

    def _wait_for(self, moment: str, commands: Sequence[ForkedPython]) -> bool:
        """Wait for a moment; return whether the run still goes on."""
        output, begun_s = self._folder / "run", time.monotonic()
        done, chance = steps_done(output), self._chance
        old = _saves_under_way(output)

        def wait(condition: Callable[[], bool]) -> None:
            while not condition() and _are_running(commands):
                time.sleep(_POLL_S)

        if moment == "start or resume":
            until = begun_s + chance.uniform(0, 1.3 * self._start_s)
            wait(lambda: time.monotonic() > until)
            return _are_running(commands)
        if moment == "save":
            wait(lambda: bool(_saves_under_way(output) - old))
            time.sleep(chance.choice((0, chance.uniform(0, 0.05))))
        elif moment == "export":
            wait(lambda: steps_done(output) == STEPS > done)
            time.sleep(chance.uniform(0, 0.5))
        else:
            wait(lambda: steps_done(output) != done)
            self._start_s = 0.7 * self._start_s + 0.3 * (time.monotonic() - begun_s)
            until = time.monotonic() + chance.uniform(0, 0.5)
            wait(lambda: time.monotonic() > until)
        return _are_running(commands)

    def _hit(self, attempt: Attempt, commands: Sequence[ForkedPython]) -> list[int]:
        """Strike; return the pids of what stays stopped until the others have ended."""
        pids = [command.pid for command in commands]
        ranks = pids if len(pids) > 1 else _children(pids[0])
        attempt.is_hit = bool(ranks)
        if not ranks:
            return []
        if attempt.blow == "suspend all for 2 s":
            everyone = list(dict.fromkeys([*pids, *ranks]))
            _signal(everyone, signal.SIGSTOP)
            time.sleep(2.0)
            _signal(everyone, signal.SIGCONT)
            return []
        victim = self._chance.choice(ranks)
        if attempt.blow == "stop a rank":
            _signal([victim], signal.SIGSTOP)
            return [victim]
        victims = {"kill a rank": [victim], "kill all ranks": ranks, "kill the parent": pids[:1]}[attempt.blow]
        _signal(victims, signal.SIGKILL)
        return []

    def _wait_for_end(self, attempt: Attempt, commands: Sequence[ForkedPython], stopped: Sequence[int]) -> None:
        until = time.monotonic() + LONGEST_END_S * (2 if _goes_on(attempt) else 1)
        others = [command for command in commands if command.pid not in stopped]
        while _are_running(others) and time.monotonic() < until:
            time.sleep(0.02)
        if _are_running(others):
            attempt.faults.append(("hangs", f"still running {LONGEST_END_S:g} s later"))
        own = {command.pid for command in commands} & set(stopped)
        if not attempt.faults:
            _signal(list(own), signal.SIGKILL)  # the test's own work: no launcher is there to end it
            for command in commands:
                command.wait(10)
            until = time.monotonic() + 5
            while (left := _processes(self._folder)) and time.monotonic() < until:
                time.sleep(0.02)
            if left:
                attempt.faults.append(("left processes", str(left)))
        end_processes(self._folder)
        for command in commands:
            command.wait(10)

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def _check(
        self, attempt: Attempt, commands: Sequence[ForkedPython], reference: Reference, newest_before: int
    ) -> None:
        found, newest = self._losses(self._folder / "run"), self._newest()
        wrong = {step: loss for step, loss in found.items() if loss != reference.losses[step]}
        if wrong:
            attempt.faults.append(("wrong losses", str(wrong)))
        if newest < newest_before:
            attempt.faults.append(("lost checkpoints", f"step {newest_before}, now {newest}"))
        statuses = [command.returncode for command in commands]
        if statuses != [0] * len(commands):
            should_end_well = not attempt.is_hit or _goes_on(attempt)
            if should_end_well and not attempt.faults:
                attempt.faults.append(("other faults", f"ended with {statuses}"))
        else:
            is_whole = list(found) == list(range(1, STEPS + 1)) and _digest(self._folder / "hf") == reference.weights
            if not is_whole:
                attempt.faults.append(("wrong losses", f"done with steps {list(found)}, or with other weights"))
            self._begin_output()
        if attempt.faults:
            kept = self._folder.with_name(f"{self._folder.name}-fault{time.time_ns()}")
            shutil.copytree(self._folder, kept, symlinks=True)
            attempt.faults.append(("", f"kept in {kept}"))
            self._begin_output()

    def _losses(self, output: Path) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in records(output) if "loss" in line}

    def _newest(self) -> int:
        """Return the step of the newest intact checkpoint, 0 if there is none; a damaged one counts as lost."""
        folder = self._folder / "run/checkpoints"
        if not folder.is_dir():
            return 0
        found = newest_intact(folder)
        return -1 if found.damaged else step_of(found.path) if found.path is not None else 0


def _processes(folder: Path) -> list[int]:
    """Pids of the processes that were started in a folder or below it."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(directory / "cwd")).is_relative_to(folder) and int(directory.name) != os.getpid():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


def end_processes(folder: Path) -> None:
    """Kill the processes that were started in a folder or below it."""
    _signal(_processes(folder), signal.SIGKILL)


def _goes_on(attempt: Attempt) -> bool:
    """Return whether a run that was hit is to end well."""
    is_restarted = attempt.launch == LAUNCHES[1] and attempt.blow != "kill the parent"
    return is_restarted or attempt.blow == "suspend all for 2 s"


def _are_running(commands: Sequence[ForkedPython]) -> bool:
    return None in [command.poll() for command in commands]


def _saves_under_way(output: Path) -> set[int]:
    """Return the inodes of the directories of checkpoints that are not yet named."""
    found = set()
    for directory in output.glob("checkpoints/.step*.tmp"):
        try:
            found.add(directory.stat().st_ino)
        except OSError:
            continue
    return found


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _digest(directory: Path) -> str:
    file = directory / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def attempt_line(attempt: Attempt) -> str:
    return json.dumps({**attempt.__dict__})
