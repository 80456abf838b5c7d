"""Ctrl-C while training: finish the step, close the files, then end."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

from megatron_ds.parallel.failure import INTERRUPTED

SAME_PRESS_S = 1.0  # one Ctrl-C under torchrun arrives twice: from the terminal, and from torchrun


class Interrupt:
    """Within it the first SIGINT sets `requested`, which the loop reads after a step; the second ends the process."""

    def __init__(self) -> None:
        self.requested = False
        self._pressed_s = 0.0

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._pressed_s = True, now
        elif now - self._pressed_s > SAME_PRESS_S:
            os._exit(INTERRUPTED)
