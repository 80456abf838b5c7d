"""Told to stop while training, by Ctrl-C, a scheduler or the clock: finish the step, save, close the files, end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

BEGAN = "MEGATRON_DS_BEGAN"
"""Environment variable of local ranks: when the command began, in seconds since the epoch, restarts included."""

SAME_PRESS_S = 1.0  # one Ctrl-C under torchrun arrives twice: from the terminal, and from torchrun
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is Slurm's warning, if asked for


@contextmanager
def counting_time() -> Iterator[None]:
    """Within it time counts for all groups of ranks that this process starts, one after the other."""
    os.environ[BEGAN] = str(time.time())
    try:
        yield
    finally:
        del os.environ[BEGAN]


class GracefulStop:
    """Within it the first signal of `STOPPING` sets `requested`, which the loop reads after a step.

    A second one, more than `SAME_PRESS_S` later, ends the process at once with 128 + its number. Only the main thread
    can have handlers; elsewhere only the clock counts.

    Args:
        max_time_s: so many seconds after this, or after `counting_time` began, `requested` is set too; None = never.

    Attributes:
        signal: the first one; None if there was none.
    """

    def __init__(self, max_time_s: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        passed_s = time.time() - float(os.environ.get(BEGAN, time.time()))
        self._ends_s = None if max_time_s is None else time.monotonic() + max_time_s - passed_s
        self._arrived_s = 0.0
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether the run is to stop after this step."""
        return self.signal is not None or (self._ends_s is not None and time.monotonic() >= self._ends_s)

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._arrived_s = signal.Signals(number), now
        elif now - self._arrived_s > SAME_PRESS_S:
            os._exit(128 + number)
