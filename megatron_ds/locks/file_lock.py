"""A lock by flock, which the kernel releases when its process ends, or else by a record of its owner.

Lustre without `-o flock`, several FUSE file systems and object stores have no flock; some mounts have one that other
machines do not see. There the owner is recorded in a file and renews it; see `owner_record`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from megatron_ds.locks.mounts import flock_is_local
from megatron_ds.locks.owner_record import OwnerRecords

POLL_S = 0.05
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


class LockHeldError(Exception):
    """Another process holds a lock.

    Attributes:
        owner: its machine and process id, such as "node2, pid 12"; empty if they are unknown.
    """

    def __init__(self, path: Path, owner: str = "") -> None:
        super().__init__(f"{path} is locked by another process" + (f" ({owner})" if owner else ""))
        self.owner = owner


class FileLock:
    """An exclusive lock among the processes of all machines that share a directory. A context manager.

    It is released at the latest when the object is dropped or the process ends; an owner that cannot release a record,
    because its machine died, loses the lock about a minute later. A process that was forked does not hold the lock of
    its parent.

    Args:
        path: the file; it is created, and stays.
        on_lost: called in a thread, with a description of the new owner, if another process has taken the lock over
            because this one did not run. This cannot happen with flock.
    """

    def __init__(self, path: Path, on_lost: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._on_lost = on_lost
        self._file: int | None = None
        self._records: OwnerRecords | None = None
        self._pid = 0

    @property
    def is_held(self) -> bool:
        """True while this object holds the lock in this process."""
        return (self._file is not None or self._records is not None) and self._pid == os.getpid()

    def acquire(self, *, blocking: bool = True) -> None:
        """Take the lock, unless this object holds it already.

        Args:
            blocking: wait until it is free. Otherwise return at once where there is flock; where there is not, as soon
                as it is clear whether its owner is alive.

        Raises:
            LockHeldError: another process holds it, and `blocking` is false.
            OSError: the file cannot be made.
        """
        if self.is_held:
            return
        self._pid = os.getpid()
        try:
            if flock_is_local(self.path.parent):
                raise OSError(errno.ENOSYS, "flock is not shared")
            while not self._take():
                if not blocking:
                    raise LockHeldError(self.path)
                time.sleep(POLL_S)
        except OSError as problem:
            if problem.errno not in NO_FLOCK:
                raise
            records = OwnerRecords(self.path, self._on_lost)
            owner = records.acquire(blocking=blocking)
            if owner:
                raise LockHeldError(self.path, owner) from None
            self._records = records

    def release(self) -> None:
        """Release the lock, if this process holds it."""
        file, records = self._file, self._records
        self._file, self._records = None, None
        is_ours = os.getpid() == self._pid
        if file is not None:
            if is_ours:
                fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)
        if records is not None and is_ours:
            records.release()

    def _take(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink == 0:  # it was removed before it was locked
                os.close(file)
                return False
        except BlockingIOError:
            os.close(file)
            return False
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return True

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()
