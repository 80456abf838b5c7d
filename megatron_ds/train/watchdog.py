"""Find the rank that hangs: each tells the others what it is doing, and who hears nothing new for long looks around.

A rank that hangs is rarely the one that notices: the others wait for it in a collective. So each rank's watchdog puts
what its rank does on a board that all can read, and when its own rank has got stuck, reads there who is behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch.distributed as dist

from megatron_ds.errors import LaunchError
from megatron_ds.log import get_logger
from megatron_ds.parallel.failure import write_failure
from megatron_ds.parallel.rank import RENDEZVOUS_FILE, RankInfo

TELL_S = 1.0  # between two notes of a rank
OTHERS_WAIT_S = 10.0  # for the rank that reports: its launcher ends them before


@dataclass(frozen=True)
class Note:
    """What a rank puts on the board.

    Attributes:
        number: of the note; it grows as long as the rank's process runs.
        beats: how often the rank has said what it does: the same for all that are equally far.
        doing: what it does.
        stack: where it stood when it had got stuck; empty before.
    """

    number: int = 0
    beats: int = 0
    doing: str = ""
    stack: str = ""


class Board(Protocol):
    """Where ranks leave notes for one another."""

    def put(self, rank: int, note: Note) -> None:
        """Leave a rank's note in the place of its last one."""

    def read(self, rank: int) -> Note:
        """The last note of a rank; an empty one if it has left none."""

    def claim(self) -> bool:
        """True for the first that asks."""


class FileBoard:
    """In a folder: for ranks of one machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, rank: int, note: Note) -> None:
        temporary = self._folder / f".{rank}.note"
        temporary.write_text(json.dumps(asdict(note)))
        os.replace(temporary, self._folder / f"{rank}.note")

    def read(self, rank: int) -> Note:
        try:
            return Note(**json.loads((self._folder / f"{rank}.note").read_text()))
        except FileNotFoundError:
            return Note()

    def claim(self) -> bool:
        try:
            os.close(os.open(self._folder / "claimed", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class StoreBoard:
    """In the store through which a launcher's ranks found one another."""

    def __init__(self, host: str, port: int) -> None:
        self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=20))

    def put(self, rank: int, note: Note) -> None:
        self._store.set(f"megatron_ds/note/{rank}", json.dumps(asdict(note)))

    def read(self, rank: int) -> Note:
        key = f"megatron_ds/note/{rank}"
        return Note(**json.loads(self._store.get(key))) if self._store.check([key]) else Note()

    def claim(self) -> bool:
        return self._store.add("megatron_ds/claimed", 1) == 1


def board_of(info: RankInfo) -> Board:
    """The board of this process's job; its process group is there."""
    if RENDEZVOUS_FILE in os.environ:
        return FileBoard(Path(os.environ[RENDEZVOUS_FILE]).parent)
    return StoreBoard(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


class Watchdog:
    """Within it this process ends, with a word on who hangs, when it has not called `beat` for too long.

    Args:
        info: which rank this is.
        timeout_s: 0 = it never ends.
        board: see `board_of`.
    """

    def __init__(self, info: RankInfo, timeout_s: float, board: Board) -> None:
        self._info, self._timeout_s, self._board = info, timeout_s, board
        self._tell_s = min(TELL_S, timeout_s / 4)
        self._note, self._beaten_s = Note(doing="starting"), time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Say what this rank does from now on, such as "step 12: reading data"."""
        self._note = Note(self._note.number, self._note.beats + 1, doing)
        self._beaten_s = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._beaten_s = time.monotonic()
        if self._timeout_s > 0:
            self._board.put(self._info.rank, self._note)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        number = 0
        while not self._ended.wait(self._tell_s):
            number += 1
            beaten_s, note = self._beaten_s, self._note
            stuck = time.monotonic() - beaten_s > self._timeout_s
            stack = _own_stack() if stuck else ""
            with contextlib.suppress(RuntimeError, OSError):  # a board that is gone: the job is ending
                self._board.put(self._info.rank, Note(number, note.beats, note.doing, stack))
            if stuck:
                self._end(number, note)

    def _end(self, number: int, note: Note) -> None:
        """Report, if this rank is the first to notice; end the process."""
        if not self._board.claim():
            until = time.monotonic() + OTHERS_WAIT_S
            while time.monotonic() < until:  # that the reporter sees that this rank lives
                number += 1
                self._board.put(self._info.rank, Note(number, note.beats, note.doing, _own_stack()))
                time.sleep(self._tell_s)
            os._exit(1)
        ranks = range(self._info.world_size)
        before = [self._board.read(rank) for rank in ranks]
        time.sleep(3 * self._tell_s)
        after = [self._board.read(rank) for rank in ranks]
        alive = [rank == self._info.rank or after[rank].number > before[rank].number for rank in ranks]
        problem = LaunchError(diagnose(after, alive, self._timeout_s))
        if RENDEZVOUS_FILE in os.environ:
            folder = Path(os.environ[RENDEZVOUS_FILE]).parent
            write_failure(folder / f"{self._info.rank}.error", self._info.rank, problem)
        else:
            get_logger().error("error: %s", problem)
        sys.stderr.flush()
        os._exit(1)


def diagnose(notes: Sequence[Note], alive: Sequence[bool], timeout_s: float) -> str:
    """Who hangs, where, and what the others do.

    Args:
        notes: of every rank.
        alive: whether a rank's process still leaves notes.
        timeout_s: for the message.
    """
    behind = min(note.beats for note in notes)
    if not all(alive):
        suspects = [rank for rank, lives in enumerate(alive) if not lives]
        verdict = "does not answer: its process is stopped or dead, or its machine is"
    elif all(note.beats == behind for note in notes):
        suspects = []
        verdict = ""
    else:
        suspects = [rank for rank, note in enumerate(notes) if note.beats == behind]
        verdict = "is behind the others"
    lines = [f"no progress for {timeout_s:g} s (train.step_timeout={timeout_s:g})"]
    lines += [f"rank {rank} {verdict}; it last said: {notes[rank].doing}" for rank in suspects]
    others = [rank for rank in range(len(notes)) if rank not in suspects]
    for doing in dict.fromkeys(notes[rank].doing for rank in others):
        same = [str(rank) for rank in others if notes[rank].doing == doing]
        who = f"rank {same[0]} {'waits' if suspects else 'stands'}"
        if len(same) > 1:
            who = f"ranks {', '.join(same)} {'wait' if suspects else 'stand'}"
        lines.append(f"{who} at: {doing}")
    told = suspects or others[:1]
    stacks = [f"rank {rank} stood at:\n{notes[rank].stack}" for rank in told if notes[rank].stack]
    return "\n".join(["; ".join(lines), *stacks])


def _own_stack() -> str:
    """Where the threads of this process stand."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().rstrip()
