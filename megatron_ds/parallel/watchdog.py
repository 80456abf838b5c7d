"""Hang detection: each rank publishes its phase, and a rank without progress reports who is behind.

The rank that notices a hang is rarely its cause: it waits in a collective for the rank that hangs. So each rank's
watchdog publishes the rank's status in a store that all ranks read. When its rank has made no progress for `timeout_s`,
it reads the statuses of the others and reports the ranks that are behind. It also looks at the life of its neighbour,
and so finds a stopped process, a dead machine and a cut link in any phase, also where a phase may take long.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

from megatron_ds.errors import LaunchError
from megatron_ds.log import flush_streams, get_logger
from megatron_ds.parallel.consensus import num_waiting
from megatron_ds.parallel.failure import write_failure
from megatron_ds.parallel.rank_files import FAILURE_FILE, unnamed_file
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.rank_status import RankStatus, RankStatusStore, rank_status_store
from megatron_ds.parallel.rendezvous import MAX_NAMED_RANKS, RankGroup, name_ranks
from megatron_ds.parallel.section_limits import MovedBytes, SectionLimits, child_processes

PUBLISH_S = 1.0  # interval between two status updates of a rank
STORE_TIMEOUT_S = 10.0  # the store counts as unreachable after this
SHORTEST_SILENCE_S = 10.0  # a busy machine may keep a process from publishing for seconds
PEER_TIMEOUT_S = 120.0  # of commands whose phases have no limit; a process that reads a large file may be silent
SHORTEST_LOOK_S = 1.0  # a rank that publishes nothing for so long, while a hang is examined, does not respond
LEAVE_S = 3.0  # time for the last statuses
MOST_STACKS = 4  # in a report; each may have a hundred lines
WRITE_S = 5.0  # time to write a report: the output, or what reads it, may be what hangs


class Heartbeat(Protocol):
    """Function that is called with each phase that a rank enters, such as "step 12: reading data"."""

    def __call__(self, phase: str, *, may_take_long: bool = False) -> None:
        """Enter a phase.

        Args:
            phase: shown in a report.
            may_take_long: its limit is that of a section without progress on any rank, such as saving, which depends on
                the storage; see `SectionLimits`.
        """


@dataclass(frozen=True)
class _Hang:
    """A hang that this rank has noticed.

    Attributes:
        text: such as `no progress for 30 s (train.step_timeout=30)`.
        timeout_s: the time limit of a phase.
        is_cut_off: whether the store does not answer, so that other ranks cannot be asked.
    """

    text: str
    timeout_s: float
    is_cut_off: bool = False


class Watchdog:
    """Context manager that ends the process with a report if the job hangs.

    These are hangs: a phase of this rank takes longer than `timeout_s`; in a section that may take long no rank has
    made progress for the time that `SectionLimits` gives it; another rank has not published its status for `timeout_s`,
    or the store is out of reach for so long. Each rank looks at the next one, so that the cost is the same at any
    number of ranks. A job that is suspended as a whole continues.

    It has two threads, one that exchanges statuses and one that checks the time, because the store may be what hangs.

    Args:
        info: rank and world size of this process.
        timeout_s: time limit of a phase in seconds; 0 = no limit.
        store: from `rank_status_store`.
        setting: the name of the time limit, for messages; empty = it has none.
        on_hang: called with the report by the rank that writes it, before the process ends.
    """

    def __init__(
        self,
        info: RankInfo,
        timeout_s: float,
        store: RankStatusStore,
        setting: str = "train.step_timeout",
        on_hang: Callable[[LaunchError], None] = lambda report: None,
    ) -> None:
        self._on_hang = on_hang
        self._info, self._timeout_s, self._store, self._setting = info, timeout_s, store, setting
        self._publish_s = min(PUBLISH_S, timeout_s / 4)
        self._look_s = max(3 * self._publish_s, SHORTEST_LOOK_S)
        self._silence_s = max(timeout_s, SHORTEST_SILENCE_S)
        self._status = RankStatus(phase="starting", host=socket.gethostname())
        self._may_take_long, self._sections, self._moved = False, SectionLimits(timeout_s), MovedBytes()
        self._is_limited = True  # False in a section of code that is not ours
        self._neighbour, self._sign, self._work = (info.rank + 1) % info.world_size, 0, 0
        self._clocks = dict.fromkeys(("phase", "work", "neighbour", "store"), 0.0)
        self._ended, self._is_due, self._stack = threading.Event(), threading.Event(), ""
        self._has_reported = False
        self._threads = [
            threading.Thread(target=act, name=f"watchdog-{act.__name__}", daemon=True)
            for act in (self._exchange, self._watch)
        ]

    def heartbeat(self, phase: str, *, may_take_long: bool = False) -> None:
        """Enter a phase; see `Heartbeat`."""
        now, before = time.monotonic(), self._status
        if self._may_take_long:
            self._sections.took(before.phase, now - self._clocks["phase"])
        self._clocks["phase"] = now  # before the rest: `_find_hang` reads it last
        self._status = replace(before, heartbeats=before.heartbeats + 1, phase=phase)
        self._may_take_long, self._is_limited = may_take_long, True
        if may_take_long:
            self._is_due.set()

    def enter_foreign_code(self, phase: str) -> None:
        """Enter a phase whose duration is not known: code of the user's. Only ranks that do not respond are a hang."""
        self.heartbeat(phase)
        self._is_limited = False

    def __enter__(self) -> Watchdog:
        self._clocks = dict.fromkeys(self._clocks, time.monotonic())
        if self._timeout_s > 0:
            self._store.put(self._info.rank, self._status)
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._status = replace(self._status, has_finished=True)
        self._ended.set()
        self._is_due.set()
        if self._threads[0].is_alive():
            self._threads[0].join(LEAVE_S)
        if error is None and self._timeout_s > 0 and self._info.rank == 0 and self._store.ends_with_rank_0:
            self._let_others_leave()

    def _let_others_leave(self) -> None:
        """Wait until the other ranks need this one's store no more, within `LEAVE_S`."""
        until = time.monotonic() + LEAVE_S
        with contextlib.suppress(RuntimeError):  # the store was torchrun's, whose agent has ended
            for rank in range(1, self._info.world_size):
                while time.monotonic() < until and not self._store.read(rank).has_finished:
                    time.sleep(0.02)

    def _exchange(self) -> None:
        """Publish the status of this rank, and look at the others, until the context is left."""
        number, is_over = 0, False
        while not is_over:
            self._is_due.wait(self._publish_s)
            self._is_due.clear()
            is_over = self._ended.is_set()
            number += 1
            try:
                waits = num_waiting() > 0
                status = replace(self._status, number=number, stack=self._stack, is_waiting=waits)
                self._store.put(self._info.rank, status)
                if not is_over:
                    self._look_at_others()
            except OSError:  # a store in files, such as of a full disk, may recover; `_find_hang` sees when it does not
                continue
            except RuntimeError:  # the process with the store is gone
                return

    def _look_at_others(self) -> None:
        counts = self._may_take_long or not self._is_limited  # it takes milliseconds in a process of many threads
        units = self._moved.take() if counts else 0
        work, sign = self._store.add_work(int(units > 0)), self._store.sign_of_life(self._neighbour)
        now = time.monotonic()
        if work != self._work:
            self._work, self._clocks["work"] = work, now
        if sign != self._sign or self._neighbour == self._info.rank:
            self._sign, self._clocks["neighbour"] = sign, now
        elif now - self._clocks["neighbour"] > self._silence_s / 2 and self._store.read(self._neighbour).has_finished:
            self._clocks["neighbour"] = now
        self._clocks["store"] = now

    def _watch(self) -> None:
        checked_s = time.monotonic()
        while not self._ended.wait(self._publish_s):
            now = time.monotonic()
            pause_s = now - checked_s
            if pause_s > 2 * self._publish_s + 1:  # this process was suspended, perhaps with its job
                for name, began_s in self._clocks.items():
                    self._clocks[name] = min(now, began_s + pause_s)
            checked_s = now
            hang = self._find_hang(now)
            if hang is not None:
                self._end(hang)

    def _find_hang(self, now: float) -> _Hang | None:
        is_long, is_limited, phase = self._may_take_long, self._is_limited, self._status.phase
        elapsed_s = {name: now - began_s for name, began_s in self._clocks.items()}
        elapsed_s["neighbour"] = self._clocks["store"] - self._clocks["neighbour"]  # as it was seen last
        setting = f"{self._setting}={self._timeout_s:g}" if self._setting else ""
        shown = f" ({setting})" if setting else ""
        is_cut_off = elapsed_s["store"] > STORE_TIMEOUT_S
        if elapsed_s["store"] > self._silence_s:
            return _Hang(f"no answer of rank 0 for {self._silence_s:g} s{shown}", self._timeout_s, is_cut_off=True)
        if elapsed_s["neighbour"] > self._silence_s:
            silent = name_ranks([self._neighbour])
            return _Hang(f"no sign of {silent} for {self._silence_s:g} s{shown}", self._timeout_s)
        if is_limited and not is_long and elapsed_s["phase"] > self._timeout_s:
            return _Hang(f"no progress for {self._timeout_s:g} s{shown}", self._timeout_s, is_cut_off)
        limit_s = self._sections.limit_s(phase)
        if is_long and self._moved.is_known and min(elapsed_s["phase"], elapsed_s["work"]) > limit_s:
            reason = self._sections.reason(phase)
            text = f"no progress of any rank for {round(limit_s, 1):g} s ({setting}; {reason})"
            return _Hang(text, self._timeout_s, is_cut_off)
        return None

    def _end(self, hang: _Hang) -> None:
        """Report the hang, if this rank notices it first, and end the process, even if nothing responds any more."""
        try:
            self._stack = _own_stack()
            if not hang.is_cut_off:
                _act_within(self._look_s + STORE_TIMEOUT_S, lambda: self._report(hang))
            if not self._has_reported:  # the process with the store does not respond
                alone = f"rank 0 or its machine does not respond; this rank's phase: {self._status.phase}"
                _act_within(WRITE_S, lambda: self._write(LaunchError(f"{hang.text}; {alone}")))
            _act_within(WRITE_S, flush_streams)
        finally:
            for child in child_processes():  # such as one that uploads, to a server that does not answer
                with contextlib.suppress(OSError):
                    os.kill(child, signal.SIGTERM)
            os._exit(1)

    def _report(self, hang: _Hang) -> None:
        """Report the hang if no other rank does; nothing is reported if the store is lost meanwhile."""
        with contextlib.suppress(RuntimeError):
            if not self._store.claim():
                time.sleep(self._look_s + STORE_TIMEOUT_S / 2)  # the reporter sees that this rank is alive, and ends it
                self._has_reported = True
                return
            ranks = range(self._info.world_size)
            before = [self._store.sign_of_life(rank) for rank in ranks]
            time.sleep(self._look_s)
            after = [self._store.sign_of_life(rank) for rank in ranks]
            statuses = [self._store.read(rank) for rank in ranks]
            alive = [
                rank == self._info.rank or after[rank] != before[rank] or statuses[rank].has_finished for rank in ranks
            ]
            self._write(LaunchError(diagnose(statuses, alive, hang.timeout_s, hang.text)))

    def _write(self, problem: LaunchError) -> None:
        self._has_reported = True
        if FAILURE_FILE in os.environ:
            write_failure(Path(os.environ[FAILURE_FILE]), self._info.rank, problem)
        else:
            get_logger().error("error: %s", problem)
            self._on_hang(problem)


def _act_within(limit_s: float, act: Callable[[], None]) -> None:
    """Call a function in a thread of its own, and leave the thread alone if it has not returned within the limit."""
    thread = threading.Thread(target=act, name="watchdog-report", daemon=True)
    thread.start()
    thread.join(limit_s)


def watch_peers(
    info: RankInfo, group: RankGroup | None = None, timeout_s: float = PEER_TIMEOUT_S, setting: str = ""
) -> AbstractContextManager[object]:
    """Return a watchdog for code whose phases are not known: it only looks for ranks that do not respond.

    Args:
        info: rank and world size of this process.
        group: a launcher's ranks; None for those that `run_local` started.
        timeout_s: a rank that has not published its status for so long counts as stopped or dead.
        setting: the name of the time limit, for messages; empty = it has none.
    """
    if info.world_size == 1:
        return nullcontext()
    watchdog = Watchdog(info, timeout_s, rank_status_store(group), setting)
    watchdog.enter_foreign_code("running")
    return watchdog


def diagnose(statuses: Sequence[RankStatus], alive: Sequence[bool], timeout_s: float, hang: str = "") -> str:
    """Return a report that names the ranks that hang, their phases and stacks, and the phases of the others.

    Of many ranks the first few are named.

    Args:
        statuses: the status of every rank.
        alive: for every rank, whether its process still publishes.
        timeout_s: the time limit, for the message.
        hang: how the hang was noticed; empty = a step took longer than the time limit.
    """
    slowest = min(status.heartbeats for status in statuses)
    suspects = [rank for rank, is_alive in enumerate(alive) if not is_alive]
    verdict = "does not respond: its process or machine is stopped or dead"
    if not suspects:
        suspects = [rank for rank, status in enumerate(statuses) if status.heartbeats == slowest]
        verdict = "is behind the others"
    if len(suspects) == len(statuses):
        suspects = [rank for rank, status in enumerate(statuses) if not status.is_waiting]
        verdict = "is waited for by the others"
    if len(suspects) == len(statuses):
        suspects = []
    lines = [hang or f"no progress for {timeout_s:g} s (train.step_timeout={timeout_s:g})"]
    hosts = {status.host for status in statuses if status.host}
    for rank in suspects[:MAX_NAMED_RANKS]:
        host = f" on {statuses[rank].host}" if len(hosts) > 1 and statuses[rank].host else ""
        lines.append(f"rank {rank}{host} {verdict}; last phase: {statuses[rank].phase or 'before the first'}")
    if len(suspects) > MAX_NAMED_RANKS:
        lines.append(f"the same holds for {len(suspects) - MAX_NAMED_RANKS} more ranks")
    others = sorted(set(range(len(statuses))) - set(suspects))
    for phase in dict.fromkeys(statuses[rank].phase for rank in others):
        same = [rank for rank in others if statuses[rank].phase == phase]
        are = "are" if len(same) > 1 else "is"
        lines.append(f"{name_ranks(same)} {are} {'waiting in' if suspects else 'in'}: {phase}")
    stacks = [(rank, statuses[rank].stack) for rank in suspects[:MOST_STACKS] or others[:1]]
    shown = [f"stack of rank {rank}:\n{stack}" for rank, stack in stacks if stack]
    return "\n".join(["; ".join(lines), *shown])


def _own_stack() -> str:
    """Return the stacks of all threads of this process."""
    with unnamed_file() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().rstrip()
