"""Standard output and error that outlive what they write to: a closed pipe, a full disk, a terminal that is gone.

A run of days must not end because its output cannot be shown. What is written here never raises: text that cannot be
written is dropped, the reason is kept, and `metrics.jsonl` has what a run showed.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any

_STANDARD = (0, 1, 2)


class LastingOutput(io.RawIOBase):
    """An output that drops what cannot be written.

    Args:
        descriptor: where to write.
        on_loss: called at the first loss.
        problem: why nothing can be written from the start on.

    Attributes:
        problem: the first error; None while everything was written.
    """

    def __init__(
        self, descriptor: int, on_loss: Callable[[OSError], None] = lambda problem: None, problem: OSError | None = None
    ) -> None:
        super().__init__()
        self._descriptor, self._on_loss = descriptor, on_loss
        self.problem = problem

    def write(self, data: Any, /) -> int:
        """Write some of the bytes, or drop all; return the number of bytes that are done with."""
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another program has made a shared terminal non-blocking
            select.select([], [self._descriptor], [])
            return 0
        except OSError as problem:
            if self.problem is None:
                self.problem = problem
                self._on_loss(problem)
            return len(data)

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True


class StandardStreams:
    """The standard streams of this process, which no command of this program can fail to write to.

    Args:
        announces: whether the loss of standard output is logged on standard error: of a command that has more results
            than what it shows.
    """

    def __init__(self, announces: bool) -> None:
        missing = _open_missing()
        self._announces = announces
        self._output = LastingOutput(1, self._announce, missing.get(1))
        self._error = LastingOutput(2, problem=missing.get(2))

    def install(self) -> None:
        """Replace `sys.stdout` and `sys.stderr`, unless they write to something else than descriptors 1 and 2."""
        if _is_standard(sys.stderr, 2):
            sys.stderr = _text(self._error, sys.stderr)
        if _is_standard(sys.stdout, 1):
            sys.stdout = _text(self._output, sys.stdout)
        if self._output.problem is not None:
            self._announce(self._output.problem)

    @property
    def lost_output(self) -> str:
        """The reason why something could not be shown; empty if all was, or if the reader had seen enough."""
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
        problem = self._output.problem
        return "" if problem is None or problem.errno == errno.EPIPE else _reason(problem)

    def _announce(self, problem: OSError) -> None:
        if self._announces:
            sys.stderr.write(f"standard output is lost ({_reason(problem)}); the command continues without it\n")


def _reason(problem: OSError) -> str:
    return (problem.strerror or str(problem)).lower()


def _open_missing() -> dict[int, OSError]:
    """Open /dev/null for closed standard descriptors, which would otherwise become those of the next opened files."""
    missing = {}
    for descriptor in _STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            missing[descriptor] = OSError(errno.EBADF, "it is closed")
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
    return missing


def _is_standard(stream: Any, descriptor: int) -> bool:
    """Return whether a stream is the one that Python opened for a descriptor; None = it was closed then."""
    if stream is None:
        return True
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor
    except (OSError, ValueError):
        return False


def _text(output: LastingOutput, like: Any) -> io.TextIOWrapper:
    """Return a text stream with the encoding of another; a character that the encoding lacks is written as \\uXXXX."""
    is_unbuffered = any(getattr(like, name, False) for name in ("line_buffering", "write_through"))
    return io.TextIOWrapper(
        io.BufferedWriter(output),
        encoding=getattr(like, "encoding", "utf-8"),
        errors="backslashreplace" if getattr(like, "errors", "strict") == "strict" else like.errors,
        line_buffering=is_unbuffered or output.fileno() == 2 or output.isatty(),
    )
