"""Mutated inputs in forked children with a limit of memory and of time, which may execute nothing."""

import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ds.errors import MegatronDSError
from tests.untrusted.mutations import FileMutation, mutate

MEMORY_BYTES = 500 << 20
CPU_S, WALL_S = 5, 60  # the machine may be busy with other work
EXECUTION = frozenset({"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.spawn"})
LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class Reader:
    """A reader, and the files of a folder that it reads.

    Attributes:
        make: writes the files into a folder that is empty.
        files: those that are mutated, under the folder; a pattern stands for one file.
        read: reads them.
        without: mutations that are waited for: a pipe that the user names, more data than can be read soon.
        is_checksummed: every change must be refused, or be in a text that `read` returns.
    """

    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    is_checksummed: bool = False
    without: tuple[FileMutation, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of one input; `fault` is empty if it was read or refused as it must be."""

    seed: int
    was_refused: bool = False
    fault: str = ""


def run_inputs(name: str, reader: Reader, seeds: Sequence[int], folder: Path) -> list[Outcome]:
    """Run mutated inputs, several in one child; the next child follows where one was killed.

    Args:
        name: of the reader, a part of each seed.
        reader: the reader.
        seeds: numbers of the inputs.
        folder: an empty one.
    """
    pristine = folder / "pristine"
    pristine.mkdir()
    reader.make(pristine)
    found: list[Outcome] = []
    while len(found) < len(seeds):
        left = seeds[len(found) :]
        lines, status = _in_child(name, reader, left, pristine, folder / "work")
        found += [_outcome(seed, line) for seed, line in zip(left, lines)]
        if len(lines) < len(left):
            found.append(Outcome(left[len(lines)], fault=_death(status)))
    return found


def _outcome(seed: int, line: str) -> Outcome:
    return Outcome(seed, line == "refused", "" if line in ("read", "refused") else line)


def _death(status: int) -> str:
    number = os.waitstatus_to_exitcode(status)
    kinds = {-signal.SIGALRM: f"no end within {WALL_S} s", -signal.SIGPROF: f"no end within {CPU_S} s of a processor"}
    return kinds.get(number, f"the process ended with {number}")


def _in_child(name: str, reader: Reader, seeds: Sequence[int], pristine: Path, work: Path) -> tuple[list[str], int]:
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        code = 1
        try:
            _limit()
            for seed in seeds:
                os.write(send, (_one(name, reader, seed, pristine, work) + "\n").encode(errors="replace"))
            code = 0
        finally:
            os._exit(code)
    os.close(send)
    with open(receive, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines()
    return lines, os.waitpid(child, 0)[1]


def _limit() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)


_executed: list[str] = []


def _watch(event: str, arguments: Any) -> None:
    if event in EXECUTION:
        _executed.append(event)


def _one(name: str, reader: Reader, seed: int, pristine: Path, work: Path) -> str:
    """Return `read`, `refused`, or the fault in one line."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work, symlinks=True)
    chance = random.Random(f"{name} {seed}")
    (target,) = work.glob(chance.choice(reader.files))
    mutate(target, chance, is_json=target.suffix in (".json", ".jsonl"), without=reader.without)
    if not _executed:
        sys.addaudithook(_watch)
        _executed.append("")  # a hook stays for the life of the process
    del _executed[1:]
    for kind, seconds in ((signal.ITIMER_PROF, CPU_S), (signal.ITIMER_REAL, WALL_S)):
        signal.setitimer(kind, seconds)
    line = _result(reader, work)
    for kind in (signal.ITIMER_PROF, signal.ITIMER_REAL):
        signal.setitimer(kind, 0)
    return f"executed {_executed[1]}" if _executed[1:] else line


def _result(reader: Reader, work: Path) -> str:
    try:
        problem = reader.read(work)
    except MegatronDSError as refused:
        text = str(refused)
        if "\n" in text or len(text) > LONGEST_MESSAGE:
            return f"a message of {len(text)} characters, {text.count(chr(10)) + 1} lines: {text[:200]!r}"
        return "refused"
    except BaseException as fault:
        frames = traceback.extract_tb(fault.__traceback__)
        own = [one for one in frames if "megatron_ds" in one.filename] or frames
        place = f"{own[-1].filename.rpartition('megatron_ds/')[2]}:{own[-1].lineno}"
        return f"{type(fault).__name__} at {place}: {' '.join(str(fault).split())[:150]}"
    if not reader.is_checksummed:
        return "read"
    return "damage was taken silently" if problem is None else "refused"
