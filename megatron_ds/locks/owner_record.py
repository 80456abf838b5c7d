"""Locks by a numbered record of their owner, for file systems without flock.

`NAME.owner-00000007` is the seventh owner of the lock NAME: machine, process, and a count that its owner raises every
`BEAT_S`. The record with the highest number holds. Whoever takes the lock creates the next number, which only one
process can do; numbers never repeat, so that nobody takes a lock from another owner than the one that was found dead.
An owner is dead if its process is gone, where that can be seen, or if a waiting process has found the same count
`MISSED_BEATS` times in a row, by its own clock: clocks of machines are never compared. A process that was suspended
finds a higher number when it runs again, and has lost the lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ds.atomic import replacing, temporary_name
from megatron_ds.errors import ConfigError
from megatron_ds.log import get_logger
from megatron_ds.processes import boot_id, read_status
from megatron_ds.untrusted import parse_record, read_bytes
from megatron_ds.untrusted.limits import LOCK_OWNER

BEAT_S = 5.0
MISSED_BEATS = 12
MAX_POLL_S = 1.0
_PID_SPACE = "/proc/self/ns/pid"


@dataclass(frozen=True)
class Owner:
    """A process that holds, or held, a lock.

    Attributes:
        host: name of its machine.
        pid: its process id.
        boot, pid_space: the start of its machine's kernel and its space of process ids; in another one, its process id
            says nothing. Empty if unknown.
        started: the time at which it started, in the kernel's ticks; tells processes of one id apart.
        beat: number of renewals.
        is_released: whether it has released the lock.
    """

    host: str
    pid: int
    boot: str = ""
    pid_space: str = ""
    started: str = ""
    beat: int = 0
    is_released: bool = False

    def describe(self) -> str:
        """Return `node2, pid 12`."""
        return f"{self.host}, pid {self.pid}"

    def is_running(self) -> bool | None:
        """Return whether its process runs; None if that cannot be seen from here."""
        here = this_process()
        if not self.boot or not self.pid_space or (self.boot, self.pid_space) != (here.boot, here.pid_space):
            return None
        return _start_of(self.pid) == self.started != ""


def this_process() -> Owner:
    """Return this process as an owner."""
    pid_space = ""
    with contextlib.suppress(OSError):  # another system than Linux
        pid_space = os.readlink(_PID_SPACE)
    return Owner(socket.gethostname(), os.getpid(), boot_id(), pid_space, _start_of(os.getpid()))


def _start_of(pid: int) -> str:
    """Return the start time of a running process in the kernel's ticks, or an empty text."""
    status = read_status(pid)
    return "" if status is None or status.has_ended else str(status.start_ticks)


class OwnerRecords:
    """The records of one lock.

    Args:
        path: the lock.
        on_lost: see `FileLock`.
    """

    def __init__(self, path: Path, on_lost: Callable[[str], None] | None = None) -> None:
        self._path, self._on_lost = path, on_lost
        self._prefix = f"{path.name}.owner-"
        self._number, self._own = 0, this_process()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, *, blocking: bool) -> str:
        """Take the lock; return the description of its owner if another process holds it and `blocking` is false."""
        watch, has_spoken = _Watch(), False
        while True:
            number = self._newest()
            content = self._read(number)
            owner = _parse(content)
            running = owner.is_running() if owner is not None else None
            state = watch.look(number, content)
            if number == 0 or (owner is not None and owner.is_released) or running is False or state == "dead":
                if self._create(number + 1):
                    self._begin(number + 1, None if owner is None or owner.is_released else owner)
                    return ""
                continue
            if not blocking and (running or state == "alive"):
                return owner.describe() if owner is not None else "unknown"
            if not has_spoken and not blocking:
                who = owner.describe() if owner is not None else "its owner"
                limit = BEAT_S * MISSED_BEATS
                get_logger().info("%s: waiting up to %g s for a sign of life of %s", self._path, limit, who)
                has_spoken = True
            time.sleep(min(BEAT_S / 2, MAX_POLL_S))

    def release(self) -> None:
        """Let the next process take the lock at once."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):  # it is found dead later
            self._write(replace(self._own, is_released=True))

    def _begin(self, number: int, dead: Owner | None) -> None:
        self._number = number
        if dead is not None:
            get_logger().warning(
                "%s: taken over from %s, which has ended without releasing it", self._path, dead.describe()
            )
        for old in self._numbers():
            if old < number:
                self._file(old).unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the disk is full or away: the next beat may succeed
                newest = self._newest()
                if newest > self._number:
                    owner = _parse(self._read(newest))
                    self._ended.set()
                    if self._on_lost is not None:
                        self._on_lost(owner.describe() if owner is not None else "another process")
                    return
                self._own = replace(self._own, beat=self._own.beat + 1)
                self._write(self._own)

    def _create(self, number: int) -> bool:
        """Create the record of a number, complete and in one step; return False if another process has done so."""
        content = json.dumps(asdict(self._own)).encode()
        target = self._file(number)
        draft = temporary_name(target)
        try:
            draft.write_bytes(content)
            try:
                os.link(draft, target)
            except FileExistsError:
                return draft.stat().st_nlink == 2  # NFS reports it too if the first response was lost
            except OSError:  # a file system without links
                with target.open("xb") as file:
                    file.write(content)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _write(self, owner: Owner) -> None:
        with replacing(self._file(self._number)) as temporary:
            temporary.write_text(json.dumps(asdict(owner)), encoding="utf-8")

    def _read(self, number: int) -> bytes:
        with contextlib.suppress(ConfigError):  # it is being written, or damaged
            return read_bytes(self._file(number), LOCK_OWNER, ConfigError)
        return b""

    def _file(self, number: int) -> Path:
        return self._path.with_name(f"{self._prefix}{number:08d}")

    def _numbers(self) -> list[int]:
        ends = [name.removeprefix(self._prefix) for name in os.listdir(self._path.parent) if self._is_record(name)]
        return [int(end) for end in ends if end.isdecimal()]

    def _is_record(self, name: str) -> bool:
        return name.startswith(self._prefix)

    def _newest(self) -> int:
        return max(self._numbers(), default=0)


class _Watch:
    """Signs of life of an owner, as the process that waits for it sees them."""

    def __init__(self) -> None:
        self._last: tuple[int, bytes] | None = None
        self._looked_s, self._missed = 0.0, 0

    def look(self, number: int, content: bytes) -> str:
        """Return "alive" after a renewal, "dead" after too many missed ones, "" before either."""
        now = time.monotonic()
        if self._last != (number, content):
            is_renewed = self._last is not None and self._last[0] == number
            self._last, self._looked_s, self._missed = (number, content), now, 0
            return "alive" if is_renewed else ""
        since_s = now - self._looked_s
        if since_s < BEAT_S:
            return ""
        self._looked_s = now
        self._missed = self._missed + 1 if since_s < 3 * BEAT_S else 0  # else this process, or the disk, was suspended
        return "dead" if self._missed >= MISSED_BEATS else ""


def _parse(content: bytes) -> Owner | None:
    try:
        return parse_record(content.decode("utf-8", "replace"), "the owner", Owner, LOCK_OWNER, ConfigError)
    except ConfigError:
        return None
