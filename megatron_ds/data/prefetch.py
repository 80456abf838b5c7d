"""Prefetching: a thread reads the batches of the next steps, in order, while this one computes.

The batches of a step depend on its position in the data alone: prefetching changes no sample, and a run that was
interrupted resumes from the steps that it completed, whatever was read beyond them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")
T = TypeVar("T")

CLOSE_S = 2.0  # a thread that is still reading by then is abandoned; it ends with the process
WAIT_SHARE = 0.05  # fraction of a step; less is not reported
WAIT_S = 0.001  # per step; steps of a few milliseconds are too short to read ahead in
WINDOW = 20  # steps


class Prefetch(Generic[K, T]):
    """A context manager that iterates over `read(key)` for each key, in order. Its thread starts on entering.

    An exception of `read` is raised at the place of its result.

    Args:
        read: called by one thread at a time.
        keys: arguments of `read`.
        ahead: number of results that are read, or being read, before they are requested; 0 = no thread.
    """

    def __init__(self, read: Callable[[K], T], keys: Iterable[K], ahead: int) -> None:
        assert ahead >= 0, f"{ahead} ahead"
        self._read, self._keys, self._ahead = read, iter(keys), ahead
        self._results: queue.SimpleQueue[tuple[T] | BaseException] = queue.SimpleQueue()
        self._room, self._closed = threading.Semaphore(ahead), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Iterator[T]:
        if self._ahead == 0:
            return map(self._read, self._keys)
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()
        return self._take()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._room.release()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _take(self) -> Iterator[T]:
        while True:
            result = self._results.get()
            if isinstance(result, StopIteration):
                return
            if isinstance(result, BaseException):
                raise result
            self._room.release()
            yield result[0]

    def _work(self) -> None:
        try:
            for key in self._keys:
                self._room.acquire()
                if self._closed.is_set():
                    return
                self._results.put((self._read(key),))
            self._results.put(StopIteration())
        except BaseException as problem:  # not hidden: raised in the thread that waits for the result
            self._results.put(problem)


def pinned(batches: list[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    """Return the batches in pinned memory, from which copies overlap with computing; unchanged on CPU."""
    if device.type == "cpu":
        return batches
    # a new thread uses the first device, and pinning would claim memory on it for every rank of the machine
    torch.get_device_module(device).set_device(device)
    return [{name: column.pin_memory() for name, column in batch.items()} for batch in batches]


class DataWait:
    """Detection of steps that wait for data, reported once.

    Args:
        ahead: `data.prefetch`.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead, self._reported = ahead, False
        self._steps, self._data_s, self._step_s = -1, 0.0, 0.0  # nothing hides the reading of the first step

    def add(self, data_s: float, step_s: float) -> str | None:
        """Count a step of `step_s` that waited for data for `data_s`; return the report, or None."""
        self._steps += 1
        if self._steps > 0:
            self._data_s, self._step_s = self._data_s + data_s, self._step_s + step_s
        if self._reported or self._steps < WINDOW:
            return None
        share, mean_s = self._data_s / self._step_s, self._data_s / self._steps
        mean_step_s = self._step_s / self._steps
        self._steps, self._data_s, self._step_s = 0, 0.0, 0.0
        if share <= WAIT_SHARE or mean_s <= WAIT_S:
            return None
        self._reported = True
        remedy = "put the data on faster storage, or raise data.prefetch where reading is uneven"
        if self._ahead == 0:
            remedy = "set data.prefetch=2"
        return f"steps wait for data: {mean_s:.3f} of {mean_step_s:.3f} s each, {share:.0%}; {remedy}"
