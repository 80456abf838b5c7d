"""The base of built-in trackers: a thread that keeps slow services off the steps, and resumed runs.

A tracker that cannot be opened is refused before the first step. Later, a service that is away must not end a run of
weeks: a line that the tracker does not take is lost for it, the first one is reported, and their number at the end.
`metrics.jsonl` has all lines.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from megatron_ds.log import get_logger
from megatron_ds.monitor.metrics import LastSteps, Metrics
from megatron_ds.monitor.sinks import SinkInfo
from megatron_ds.monitor.trackers.ids import save_id
from megatron_ds.monitor.trackers.values import Line, line_of

MAX_WAITING = 10_000  # lines; of a service that is away for longer, further ones are lost
CLOSE_S = 60.0  # time for the lines that still wait when the run ends


class Tracker(ABC):
    """A metric sink that hands lines to a tracking package in a thread of its own.

    A subclass opens the package's run in its constructor and calls `super().__init__` last. What the tracker's run has
    had before is not sent again, unless it `rewinds`.

    Args:
        info: the run.
        run_id: the id of the tracker's run, which a resumed run gets by `known_id`.

    Attributes:
        package: the module that has to be installed; None = the standard library is enough.
        extra: the extra of this package that installs it.
        secret: the environment variables that have its key or password.
        rewinds: True if the subclass removes the steps after a resumed run's checkpoint from the tracker.
        failed: set before `close` if an error ended the run.
    """

    package: ClassVar[str | None] = None
    extra: ClassVar[str] = ""
    secret: ClassVar[str] = "an environment variable"
    rewinds: ClassVar[bool] = False

    def __init__(self, info: SinkInfo, run_id: str) -> None:
        self._field, self.failed = info.entry, False
        had = save_id(info, run_id)
        self._had = LastSteps() if self.rewinds else had
        self._num_lines = self._num_lost = 0
        self._is_reported = False
        self._waiting: queue.Queue[Line | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name=info.entry, daemon=True)
        self._thread.start()

    @abstractmethod
    def log(self, line: Line) -> None:
        """Hand over a line. Called in the tracker's thread, in the order of the steps; may raise anything."""

    @abstractmethod
    def finish(self) -> None:
        """Flush and close. Called in the tracker's thread; may raise anything."""

    def write(self, metrics: Metrics) -> None:
        """Queue a line, without waiting for the tracker."""
        if self._had.includes(metrics):
            return
        self._num_lines += 1
        try:
            self._waiting.put_nowait(line_of(metrics))
        except queue.Full:
            self._num_lost += 1
            self._report(f"{MAX_WAITING:,} lines are waiting")

    def close(self) -> None:
        """Wait until all lines are handed over, at most `CLOSE_S` seconds."""
        try:
            self._waiting.put(None, timeout=CLOSE_S)
            self._thread.join(CLOSE_S)
        except queue.Full:
            self._report("its lines are still waiting")
        lost = self._num_lost + self._waiting.qsize()
        if self._thread.is_alive():
            get_logger().warning("%s did not finish within %.0f s", self._field, CLOSE_S)
        if lost:
            get_logger().warning(
                "%s has lost %d of %d lines; metrics.jsonl has all of them", self._field, lost, self._num_lines
            )

    def _work(self) -> None:
        while (line := self._waiting.get()) is not None:
            self._num_lost += not self._succeeds(self.log, line)
            self._waiting.task_done()
        self._succeeds(self.finish)

    def _succeeds(self, action: Callable[..., None], *arguments: Line) -> bool:
        try:
            action(*arguments)
        except Exception as problem:  # of any package, or of its network
            self._report(describe(problem))
            return False
        return True

    def _report(self, reason: str) -> None:
        """Log why the tracker does not take a line, once."""
        if not self._is_reported:
            self._is_reported = True
            get_logger().warning("%s takes no lines (%s); the run continues without it", self._field, reason)


def describe(problem: Exception) -> str:
    """Return an exception on one line, shortened."""
    text = " ".join([f"{type(problem).__name__}:", *str(problem).split()])
    return text if len(text) <= 300 else f"{text[:297]}..."
