"""A forked process that answers requests within limits of processor time, memory and output.

Chat templates are programs of whoever made the tokenizer. The sandbox of jinja keeps them from files and attributes,
but not from running for ever or filling all memory, and neither can be stopped in the process itself: one operation of
a template, such as the product of a text and a number, may do both. So the kernel limits a process of its own. It has
the code and the modules of this one, no files and sockets but its two pipes, and ends with this process, with its last
reference, or after some seconds without a request.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import pickle
import resource
import select
import signal
import struct
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_LENGTH = struct.Struct("<Q")
_TICK_S = 1.0
_IDLE = 10
"""Ticks without a request after which a process ends; the next call forks another one."""
_POLLS = 300
"""Ticks of the process that asks after which the other one hangs; they do not pass while a job is stopped."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        time_s: of processor time, and `time_s_per_mb` more for each MB of the request.
        memory_bytes: beyond what the process has when it starts.
        answer_bytes: of the answer.
    """

    time_s: float = 3.0
    time_s_per_mb: float = 1.0
    memory_bytes: int = 2**29
    answer_bytes: int = 2**26


class LimitExceeded(Exception):
    """A request needs more than its limits; the text says of what, such as "3 s of processor time"."""


class RequestFailed(Exception):
    """The function raised an exception; the text is its message."""


class LimitedProcess:
    """A function that is called in a process of its own, which is forked by the first call.

    Args:
        function: takes what can be pickled, and returns what can be written as JSON.
        limits: of each call.
    """

    def __init__(self, function: Callable[[Any], Any], limits: Limits = Limits()) -> None:
        self._function, self._limits = function, limits
        self._child: _Child | None = None

    def call(self, request: object) -> Any:
        """Return what the function returns.

        Raises:
            LimitExceeded: a limit is exceeded; the process has ended, and the next call forks another one.
            RequestFailed: the function raises an exception.
        """
        if self._child is None or self._child.owner != os.getpid():  # that of a process which this one was forked from
            self._child = _Child(self._function, self._limits)
        try:
            kind, content = json.loads(self._child.ask(pickle.dumps(request)))
        except EOFError:
            if problem := self._end():
                raise LimitExceeded(problem) from None
            return self.call(request)  # it had nothing to do and has ended
        except BaseException:  # an interrupt: the answer to come is not that to the next request
            self._end()
            raise
        if kind == "limit":
            self._end()
            raise LimitExceeded(content)
        if kind == "failed":
            raise RequestFailed(content)
        return content

    def _end(self) -> str:
        """End the process; see `_Child.end`."""
        child, self._child = self._child, None
        assert child is not None
        return child.end()


class _Child:
    """The other process, and the ends of its pipes."""

    def __init__(self, function: Callable[[Any], Any], limits: Limits) -> None:
        self.owner, self._limits = os.getpid(), limits
        (requests, self._requests), (self._answers, answers) = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # on threads, of which the other process has none
            self._pid = os.fork()
        if self._pid == 0:
            _serve(function, limits, self.owner, requests, answers)
        os.close(requests)
        os.close(answers)
        self._finalizer = weakref.finalize(self, _finish, self.owner, self._pid, self._requests, self._answers)

    def ask(self, request: bytes) -> bytes:
        """Return the answer to a request.

        Raises:
            EOFError: the process ends without one.
        """
        try:
            _write(self._requests, request)
        except BrokenPipeError:
            raise EOFError from None
        for _ in range(_POLLS):
            if _has_content(self._answers):
                return _read(self._answers)
        raise EOFError

    def end(self) -> str:
        """End the process; return the limit that it was over, or an empty text if it has ended by itself."""
        limits, status = self._limits, self._finalizer()
        if status == 0:
            return ""
        if status is None or os.WIFEXITED(status) or os.WTERMSIG(status) != signal.SIGXCPU:
            return f"{limits.memory_bytes // 2**20} MB of memory, or its process was killed"
        return f"{limits.time_s:g} s of processor time"


def _finish(owner: int, pid: int, *pipes: int) -> int | None:
    """End the process of a `_Child`; return the status with which it ended, None if another one has taken it."""
    for pipe in pipes:
        os.close(pipe)
    if os.getpid() != owner:
        return None
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found == 0:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
    except (ChildProcessError, ProcessLookupError):
        return None
    return status


def _serve(function: Callable[[Any], Any], limits: Limits, owner: int, requests: int, answers: int) -> NoReturn:
    """Answer requests until their pipe or their process ends; never return to the code that has forked."""
    status = 1
    try:
        _become_alone(requests, answers)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, used + limits.memory_bytes)
        ticks = 0
        while os.getppid() == owner and ticks < _IDLE:
            ticks += 1
            if _has_content(requests):
                _write(answers, _answer(function, limits, _read(requests)))
                ticks = 0
        status = 0
    except BaseException:
        status = 1  # the pipe has ended; there is nobody to tell
    finally:
        os._exit(status)


def _become_alone(*kept: int) -> None:
    """Close all files but some, and take no signals meant for the process that was forked.

    A signal to all processes of a job may be a request to save and continue. This process ends with the other one.
    """
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - set(kept):  # the limit of files may be 2^30
        with contextlib.suppress(OSError):  # the one that has listed them
            os.close(descriptor)
    for descriptor in set(range(3)) - set(kept):  # what a library prints must not get into a pipe
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    gc.freeze()  # else a collection would copy all memory


def _answer(function: Callable[[Any], Any], limits: Limits, request: bytes) -> bytes:
    """Return the answer to a request as JSON: its kind and its content."""
    seconds = limits.time_s + limits.time_s_per_mb * len(request) / 1e6
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))
    try:
        answer = json.dumps(("done", function(pickle.loads(request)))).encode()
    except MemoryError:
        answer = b""
    except Exception as problem:  # any, of the expressions of a template
        answer = json.dumps(("failed", " ".join(str(problem).split())[:1000])).encode()
    if not answer:
        answer = json.dumps(("limit", f"{limits.memory_bytes // 2**20} MB of memory")).encode()
    elif len(answer) > limits.answer_bytes:
        answer = json.dumps(("limit", f"{limits.answer_bytes // 2**20} MB of text")).encode()
    return answer


def _limit(which: int, soft: int) -> None:
    _, hard = resource.getrlimit(which)
    resource.setrlimit(which, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _has_content(pipe: int) -> bool:
    """Wait for a tick until there is something to read, or the end; `select` cannot wait for descriptors above 1023."""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    return bool(waiting.poll(_TICK_S * 1000))


def _write(pipe: int, content: bytes) -> None:
    left = memoryview(_LENGTH.pack(len(content)) + content)
    while left:
        left = left[os.write(pipe, left) :]


def _read(pipe: int) -> bytes:
    (length,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size))
    return _read_exactly(pipe, length)


def _read_exactly(pipe: int, length: int) -> bytes:
    pieces, left = list[bytes](), length
    while left:
        piece = os.read(pipe, min(left, 2**20))
        if not piece:
            raise EOFError
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
