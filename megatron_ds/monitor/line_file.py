"""Files that grow by whole lines, and that a full disk makes wait instead of ending the run.

A run of weeks must not end because the disk of its records is full for an hour: its state is in its checkpoints. The
lines that cannot be written wait in memory; they are written, in their order, as soon as there is room.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_ds.log import get_logger


class LineFile:
    """A file that grows by whole lines; no other process writes to it. It is opened when the first line is added.

    Args:
        path: the file; its directory exists.

    Attributes:
        reason: why lines wait, as the system says it; empty = none do.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.reason = path, ""
        self._waiting: list[bytes] = []
        self._descriptor: int | None = None
        self._was_reported = False

    @property
    def num_waiting(self) -> int:
        """Number of lines that are not written yet."""
        return len(self._waiting)

    def add(self, *lines: str) -> None:
        """Write lines, each with its newline, after those that wait. What the disk does not take waits."""
        self._waiting += [line.encode("utf-8", "surrogateescape") for line in lines]
        self.write_waiting()

    def write_waiting(self) -> None:
        """Write the lines that wait, as far as there is room."""
        if not self._waiting:
            return
        try:
            self._write(self._open())
        except OSError as problem:
            self._report(problem.strerror or str(problem))
            return
        if self.reason:
            get_logger().info("%s is written again; no line is lost", self.path)
        self.reason = ""

    def close(self) -> None:
        """Write the lines that wait, and close the file; closing twice is allowed."""
        self.write_waiting()
        if self._waiting:
            get_logger().warning("%s: %d lines are lost (%s)", self.path, len(self._waiting), self.reason)
            self._waiting.clear()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """Return the descriptor of the file. A line that a crash has torn is ended first."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.lseek(self._descriptor, 0, os.SEEK_END)
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                self._waiting.insert(0, b"\n")
        return self._descriptor

    def _write(self, descriptor: int) -> None:
        """Write the lines that wait; when the disk takes no more, whole lines only are left in the file."""
        data, written = b"".join(self._waiting), 0
        start = os.lseek(descriptor, 0, os.SEEK_END)
        try:
            while written < len(data):
                written += os.write(descriptor, memoryview(data)[written:])
        except OSError:
            whole = data.rfind(b"\n", 0, written) + 1
            del self._waiting[: data.count(b"\n", 0, whole)]
            if whole != written:  # the rest would be torn if the process ended now
                os.ftruncate(descriptor, start + whole)
            raise
        self._waiting.clear()

    def _report(self, reason: str) -> None:
        if not self._was_reported:
            self._was_reported = True
            get_logger().warning(
                "%s cannot be written (%s); its lines wait in memory until there is room, and the run continues",
                self.path,
                reason,
            )
        self.reason = reason
