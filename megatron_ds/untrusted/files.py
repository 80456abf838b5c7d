"""Bytes, text and lines of regular files, at most as many as the limits allow."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_ds.errors import MegatronDSError
from megatron_ds.untrusted.limits import Limits

ErrorType = type[MegatronDSError]

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_bytes(path: Path, limits: Limits, error: ErrorType) -> bytes:
    """Return the content of a regular file.

    Raises:
        error: it is missing (`is_missing`), cannot be read, is no regular file, or is too large.
    """
    with _opened(path, limits, error) as file:
        try:
            content = file.read(limits.max_bytes + 1)
        except OSError as problem:
            raise _unreadable(path, problem, error) from problem
    if len(content) > limits.max_bytes:  # it has grown, or has no size, as files of the kernel
        raise _too_large(path, len(content), limits, error)
    return content


def read_text(path: Path, limits: Limits, error: ErrorType) -> str:
    """Return the UTF-8 text of a regular file; see `read_bytes`."""
    try:
        return read_bytes(path, limits, error).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text ({problem.reason} at byte {problem.start}); {limits.fix}") from problem


def read_lines(path: Path, limits: Limits, error: ErrorType) -> Iterator[bytes]:
    """Yield the lines of a regular file of any size, with their ends; `max_bytes` is the limit of one line.

    Raises:
        error: see `read_bytes`.
    """
    with _opened(path, limits, error, any_size=True) as file:
        number = 0
        while True:
            try:
                line = file.readline(limits.max_bytes + 1)
            except OSError as problem:
                raise _unreadable(path, problem, error) from problem
            if not line:
                return
            number += 1
            if len(line) > limits.max_bytes:
                raise error(f"{path}, line {number}: longer than {limits.max_bytes:,} bytes; {limits.fix}")
            yield line


def require_regular(path: Path, error: ErrorType) -> None:
    """Check that a path is a regular file, for a library that opens it by itself.

    Raises:
        error: it is missing, or something else; to open a pipe would wait for ever.
    """
    try:
        _require_regular(path, os.stat(path), error)
    except OSError as problem:
        raise _unreadable(path, problem, error) from problem
    except ValueError as problem:  # of a name with a null byte
        raise error(f"{str(path)!r} is not the name of a file ({problem})") from problem


def is_missing(problem: BaseException) -> bool:
    """Test whether an error of a reader is about a file that does not exist."""
    return isinstance(problem.__cause__, FileNotFoundError | NotADirectoryError)


@contextmanager
def _opened(path: Path, limits: Limits, error: ErrorType, *, any_size: bool = False) -> Iterator[BinaryIO]:
    """Open a regular file; nothing else is opened, because to open a pipe waits and to open a device may act."""
    try:
        _require_regular(path, os.stat(path), error)
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  closed below
    except OSError as problem:
        raise _unreadable(path, problem, error) from problem
    except ValueError as problem:  # of a name with a null byte
        raise error(f"{str(path)!r} is not the name of a file ({problem})") from problem
    with file:
        status = os.fstat(file.fileno())  # of what is open: the name may mean another file by now
        _require_regular(path, status, error)
        if status.st_size > limits.max_bytes and not any_size:
            raise _too_large(path, status.st_size, limits, error)
        yield file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _require_regular(path: Path, status: os.stat_result, error: ErrorType) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise error(f"{path} cannot be read: Is a directory; try `ls -l {path}`")
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise error(f"{path} cannot be read: it is {kind}, not a regular file; try `ls -l {path}`")


def _unreadable(path: Path, problem: OSError, error: ErrorType) -> MegatronDSError:
    if isinstance(problem, FileNotFoundError | NotADirectoryError):
        return error(f"{path} is missing")
    return error(f"{path} cannot be read: {problem.strerror or problem}; try `ls -l {path}`")


def _too_large(path: Path, found: int, limits: Limits, error: ErrorType) -> MegatronDSError:
    return error(
        f"{path} has {found:,} bytes, more than the {limits.max_bytes:,} that {limits.name} may have; {limits.fix}"
    )
