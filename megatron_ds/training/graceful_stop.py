"""Graceful stop on a signal or a time limit: finish the step, save, close the files, exit.

The signals are SIGINT, SIGTERM, SIGUSR1, and SIGHUP of a terminal that is gone, unless it is ignored, as under nohup.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from megatron_ds.parallel.launch import handled_stop_signals

STARTED_AT = "MEGATRON_DS_BEGAN"
"""Environment variable of local ranks: start time of the command, in seconds since the epoch; restarts keep it."""

DEBOUNCE_S = 1.0  # under torchrun one Ctrl-C arrives twice: from the terminal and from torchrun


@contextmanager
def counting_time() -> Iterator[None]:
    """Count `train.max_time` from here for all groups of ranks that this process starts, restarts included."""
    os.environ[STARTED_AT] = str(time.time())
    try:
        yield
    finally:
        del os.environ[STARTED_AT]


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a Ctrl-C end the process at once, as other signals do by default, even while it waits in a collective.

    Python's own handler for SIGINT runs only when such a wait has ended. To be used where nothing is lost: before the
    first step. Only the main thread can set handlers.
    """
    waits = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL) if waits else None
    try:
        yield
    finally:
        if waits:
            signal.signal(signal.SIGINT, before)


class GracefulStop:
    """Context manager in which a signal of `STOP_SIGNALS` sets `requested`, which the loop reads after each step.

    A second signal, more than `DEBOUNCE_S` later, ends the process at once with status 128 + its number; SIGHUP does
    not, because a shell and the system may send several for one terminal. Only the main thread can install signal
    handlers; in other threads only the time limit has an effect.

    Args:
        max_time_s: time limit in seconds, from here or from the start of `counting_time`; `requested` is set when it
            has passed. None = no limit.

    Attributes:
        signal: the first signal that was received; None before it.
    """

    def __init__(self, max_time_s: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        elapsed_s = time.time() - float(os.environ.get(STARTED_AT, time.time()))
        self._deadline_s = None if max_time_s is None else time.monotonic() + max_time_s - elapsed_s
        self._received_s = 0.0
        self._previous_handlers: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """True once the run has to stop after the current step."""
        return self.signal is not None or (self._deadline_s is not None and time.monotonic() >= self._deadline_s)

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._handle) for number in handled_stop_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # returned by signal.signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._received_s = signal.Signals(number), now
        elif number != signal.SIGHUP and now - self._received_s > DEBOUNCE_S:
            os._exit(128 + number)
