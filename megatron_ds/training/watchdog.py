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

from megatron_ds.atomic import replacing
from megatron_ds.errors import LaunchError
from megatron_ds.log import get_logger
from megatron_ds.parallel.failure import write_failure
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo

TELL_S = 1.0  # between two notes of a rank
BOARD_S = 10.0  # a board that has not answered by then does not


@dataclass(frozen=True)
class RankStatus:
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


class RankStatusStore(Protocol):
    """Where ranks leave notes for one another."""

    def put(self, rank: int, note: RankStatus) -> None:
        """Leave a rank's note in the place of its last one."""

    def read(self, rank: int) -> RankStatus:
        """The last note of a rank; an empty one if it has left none."""

    def claim(self) -> bool:
        """True for the first that asks."""


class FileStatusStore:
    """In a folder: for ranks of one machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, rank: int, note: RankStatus) -> None:
        with replacing(self._folder / f"{rank}.note") as temporary:
            temporary.write_text(json.dumps(asdict(note)))

    def read(self, rank: int) -> RankStatus:
        try:
            return RankStatus(**json.loads((self._folder / f"{rank}.note").read_text()))
        except FileNotFoundError:
            return RankStatus()

    def claim(self) -> bool:
        try:
            os.close(os.open(self._folder / "claimed", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


class TorchStoreStatusStore:
    """In the store through which a launcher's ranks found one another.

    Args:
        host, port: of the store.
        group: which of the groups that a launcher started one after the other.
    """

    def __init__(self, host: str, port: int, group: str = "0") -> None:
        self._store = dist.PrefixStore(
            f"megatron_ds/{group}", dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=20))
        )

    def put(self, rank: int, note: RankStatus) -> None:
        self._store.set(f"note/{rank}", json.dumps(asdict(note)))

    def read(self, rank: int) -> RankStatus:
        key = f"note/{rank}"
        return RankStatus(**json.loads(self._store.get(key))) if self._store.check([key]) else RankStatus()

    def claim(self) -> bool:
        return self._store.add("claimed", 1) == 1


def rank_status_store(info: RankInfo) -> RankStatusStore:
    """The board of this process's job; its process group is there."""
    if RENDEZVOUS_FILE in os.environ:
        return FileStatusStore(Path(os.environ[RENDEZVOUS_FILE]).parent)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a group
    return TorchStoreStatusStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), restarts)


class Heartbeat(Protocol):
    """Is told what a rank does from now on, such as "step 12: reading data"."""

    def __call__(self, doing: str, *, may_take_long: bool = False) -> None:
        """`may_take_long`: as long as it likes: storage decides how long saving takes."""


class Watchdog:
    """Within it this process ends, with a word on who hangs, when it has not called `beat` for too long.

    Two threads: one leaves notes on the board, the other looks at the clock. The board may be what hangs.

    Args:
        info: which rank this is.
        timeout_s: 0 = it never ends.
        board: see `board_of`.
    """

    def __init__(self, info: RankInfo, timeout_s: float, board: RankStatusStore) -> None:
        self._info, self._timeout_s, self._board = info, timeout_s, board
        self._tell_s = min(TELL_S, timeout_s / 4)
        self._note, self._beaten_s, self._is_limited = RankStatus(doing="starting"), time.monotonic(), True
        self._ended, self._stack = threading.Event(), ""
        self._threads = [
            threading.Thread(target=act, name=f"watchdog-{act.__name__}", daemon=True)
            for act in (self._tell, self._watch)
        ]

    def heartbeat(self, doing: str, *, may_take_long: bool = False) -> None:
        """See `Beat`."""
        self._note = RankStatus(self._note.number, self._note.beats + 1, doing)
        self._is_limited, self._beaten_s = not may_take_long, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._beaten_s = time.monotonic()
        if self._timeout_s > 0:
            self._board.put(self._info.rank, self._note)
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _tell(self) -> None:
        number = 0
        with contextlib.suppress(RuntimeError, OSError):  # a board that is gone: the job is ending
            while not self._ended.wait(self._tell_s):
                number += 1
                self._board.put(self._info.rank, RankStatus(number, self._note.beats, self._note.doing, self._stack))

    def _watch(self) -> None:
        looked_s = time.monotonic()
        while not self._ended.wait(self._tell_s):
            now = time.monotonic()
            if now - looked_s > 2 * self._tell_s + 1:  # this process was stopped itself, with its job it may be
                self._beaten_s += now - looked_s
            looked_s = now
            if self._is_limited and now - self._beaten_s > self._timeout_s:
                self._end()

    def _end(self) -> None:
        """Report, if this rank is the first to notice; end the process, whatever becomes of the board."""
        try:
            self._stack = _own_stack()
            report = threading.Thread(target=self._report, name="watchdog-report", daemon=True)
            report.start()
            report.join(3 * self._tell_s + BOARD_S)
            if report.is_alive():  # who keeps the board does not answer
                what = f"no progress for {self._timeout_s:g} s (train.step_timeout={self._timeout_s:g})"
                self._write(LaunchError(f"{what}; rank 0 or its machine does not answer; here: {self._note.doing}"))
        finally:
            sys.stderr.flush()
            os._exit(1)

    def _report(self) -> None:
        if not self._board.claim():
            time.sleep(3 * self._tell_s + BOARD_S / 2)  # the reporter sees that this rank lives; it is ended before
            os._exit(1)
        ranks = range(self._info.world_size)
        before = [self._board.read(rank) for rank in ranks]
        time.sleep(3 * self._tell_s)
        after = [self._board.read(rank) for rank in ranks]
        alive = [rank == self._info.rank or after[rank].number > before[rank].number for rank in ranks]
        self._write(LaunchError(diagnose(after, alive, self._timeout_s)))

    def _write(self, problem: LaunchError) -> None:
        if RENDEZVOUS_FILE in os.environ:
            folder = Path(os.environ[RENDEZVOUS_FILE]).parent
            write_failure(folder / f"{self._info.rank}.error", self._info.rank, problem)
        else:
            get_logger().error("error: %s", problem)


def diagnose(notes: Sequence[RankStatus], alive: Sequence[bool], timeout_s: float) -> str:
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
