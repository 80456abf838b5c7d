"""Hang detection: each rank publishes its phase, and a rank without progress reports who is behind.

The rank that notices a hang is rarely its cause: it waits in a collective for the rank that hangs. So each rank's
watchdog publishes the rank's status in a store that all ranks read. When its rank has made no progress for `timeout_s`,
it reads the statuses of the others and reports the ranks that are behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from megatron_ds.errors import LaunchError
from megatron_ds.log import flush_streams, get_logger
from megatron_ds.parallel.failure import write_failure
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo
from megatron_ds.parallel.rank_status import RankStatus, RankStatusStore

PUBLISH_S = 1.0  # interval between two status updates of a rank
STORE_TIMEOUT_S = 10.0  # the store counts as unreachable after this


class Heartbeat(Protocol):
    """Function that is called with each phase that a rank enters, such as "step 12: reading data"."""

    def __call__(self, phase: str, *, may_take_long: bool = False) -> None:
        """Enter a phase. `may_take_long`: the phase has no time limit, such as saving, which depends on the storage."""


class Watchdog:
    """Context manager that ends the process with a report if `heartbeat` is not called for `timeout_s` seconds.

    It has two threads, one that publishes the status and one that checks the time, because the store may be what hangs.

    Args:
        info: rank and world size of this process.
        timeout_s: time limit of a phase in seconds; 0 = no limit.
        store: from `rank_status_store`.
    """

    def __init__(self, info: RankInfo, timeout_s: float, store: RankStatusStore) -> None:
        self._info, self._timeout_s, self._store = info, timeout_s, store
        self._publish_s = min(PUBLISH_S, timeout_s / 4)
        self._status, self._heartbeat_at_s, self._is_limited = RankStatus(phase="starting"), time.monotonic(), True
        self._ended, self._stack = threading.Event(), ""
        self._threads = [
            threading.Thread(target=act, name=f"watchdog-{act.__name__}", daemon=True)
            for act in (self._publish, self._watch)
        ]

    def heartbeat(self, phase: str, *, may_take_long: bool = False) -> None:
        """Enter a phase; see `Heartbeat`."""
        self._status = RankStatus(self._status.number, self._status.heartbeats + 1, phase)
        self._is_limited, self._heartbeat_at_s = not may_take_long, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._heartbeat_at_s = time.monotonic()
        if self._timeout_s > 0:
            self._store.put(self._info.rank, self._status)
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _publish(self) -> None:
        number = 0
        with contextlib.suppress(RuntimeError, OSError):  # the store is gone: the job is ending
            while not self._ended.wait(self._publish_s):
                number += 1
                status = RankStatus(number, self._status.heartbeats, self._status.phase, self._stack)
                self._store.put(self._info.rank, status)

    def _watch(self) -> None:
        checked_s = time.monotonic()
        while not self._ended.wait(self._publish_s):
            now = time.monotonic()
            if now - checked_s > 2 * self._publish_s + 1:  # this process was suspended, perhaps with its job
                self._heartbeat_at_s += now - checked_s
            checked_s = now
            if self._is_limited and now - self._heartbeat_at_s > self._timeout_s:
                self._end()

    def _end(self) -> None:
        """Report the hang, if this rank notices it first, and end the process even if the store does not respond."""
        try:
            self._stack = _own_stack()
            report = threading.Thread(target=self._report, name="watchdog-report", daemon=True)
            report.start()
            report.join(3 * self._publish_s + STORE_TIMEOUT_S)
            if report.is_alive():  # the process with the store does not respond
                timeout = f"no progress for {self._timeout_s:g} s (train.step_timeout={self._timeout_s:g})"
                self._write(
                    LaunchError(
                        f"{timeout}; rank 0 or its machine does not respond; this rank's phase: {self._status.phase}"
                    )
                )
        finally:
            flush_streams()
            os._exit(1)

    def _report(self) -> None:
        if not self._store.claim():
            time.sleep(
                3 * self._publish_s + STORE_TIMEOUT_S / 2
            )  # the reporter sees that this rank is alive, and ends it
            os._exit(1)
        ranks = range(self._info.world_size)
        before = [self._store.read(rank) for rank in ranks]
        time.sleep(3 * self._publish_s)
        after = [self._store.read(rank) for rank in ranks]
        alive = [rank == self._info.rank or after[rank].number > before[rank].number for rank in ranks]
        self._write(LaunchError(diagnose(after, alive, self._timeout_s)))

    def _write(self, problem: LaunchError) -> None:
        if RENDEZVOUS_FILE in os.environ:
            folder = Path(os.environ[RENDEZVOUS_FILE]).parent
            write_failure(folder / f"{self._info.rank}.error", self._info.rank, problem)
        else:
            get_logger().error("error: %s", problem)


def diagnose(statuses: Sequence[RankStatus], alive: Sequence[bool], timeout_s: float) -> str:
    """Return a report that names the ranks that hang, their phases and stacks, and the phases of the others.

    Args:
        statuses: the status of every rank.
        alive: for every rank, whether its process still publishes.
        timeout_s: the time limit, for the message.
    """
    slowest = min(status.heartbeats for status in statuses)
    if not all(alive):
        suspects = [rank for rank, is_alive in enumerate(alive) if not is_alive]
        verdict = "does not respond: its process or machine is stopped or dead"
    elif all(status.heartbeats == slowest for status in statuses):
        suspects = []
        verdict = ""
    else:
        suspects = [rank for rank, status in enumerate(statuses) if status.heartbeats == slowest]
        verdict = "is behind the others"
    lines = [f"no progress for {timeout_s:g} s (train.step_timeout={timeout_s:g})"]
    lines += [f"rank {rank} {verdict}; last phase: {statuses[rank].phase}" for rank in suspects]
    others = [rank for rank in range(len(statuses)) if rank not in suspects]
    for phase in dict.fromkeys(statuses[rank].phase for rank in others):
        same = [str(rank) for rank in others if statuses[rank].phase == phase]
        ranks = f"rank {same[0]} is" if len(same) == 1 else f"ranks {', '.join(same)} are"
        lines.append(f"{ranks} {'waiting in' if suspects else 'in'}: {phase}")
    stacks = [(rank, statuses[rank].stack) for rank in suspects or others[:1]]
    shown = [f"stack of rank {rank}:\n{stack}" for rank, stack in stacks if stack]
    return "\n".join(["; ".join(lines), *shown])


def _own_stack() -> str:
    """Return the stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().rstrip()
