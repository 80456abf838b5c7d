"""Read what the next steps need while this one computes: in a thread, in order, and no more than asked for.

What is read for a step is a function of its place in the data alone, so that reading ahead changes no sample, and a run
that is cut goes on from the steps it did, whatever was read beyond them.
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

CLOSE_S = 2.0  # a thread that is still reading by then is left behind; it ends with the process
WAIT_SHARE = 0.05  # of a step; less is not worth a word
WAIT_S = 0.001  # a step; steps of a few milliseconds have no time to read ahead in
WINDOW = 20


class Prefetch(Generic[K, T]):
    """Iterates over `read(key)` for each key, in order, within its context. Starts its thread there, not before.

    An exception of `read` is raised where its result would have been.

    Args:
        read: called by one thread at a time.
        keys: what is read.
        ahead: how many results are read, or being read, before they are asked for; 0 = without a thread.
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
        except BaseException as problem:  # none is hidden: who waits for the result has it
            self._results.put(problem)


def pinned(batches: list[dict[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    """The same in memory that an accelerator copies from while it computes; as they are where there is none."""
    if device.type == "cpu":
        return batches
    # a thread begins on the first device, and pinning would claim memory on it for every rank of the machine
    torch.get_device_module(device).set_device(device)
    return [{name: column.pin_memory() for name, column in batch.items()} for batch in batches]


class DataWait:
    """Notices that steps wait for data; says so once.

    Args:
        ahead: `data.prefetch`.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead, self._told = ahead, False
        self._steps, self._data_s, self._step_s = -1, 0.0, 0.0  # the first step has nothing to hide its reading behind

    def add(self, data_s: float, step_s: float) -> str | None:
        """What there is to say after a step of `step_s`, of which it waited `data_s`."""
        self._steps += 1
        if self._steps > 0:
            self._data_s, self._step_s = self._data_s + data_s, self._step_s + step_s
        if self._told or self._steps < WINDOW:
            return None
        share, mean_s = self._data_s / self._step_s, self._data_s / self._steps
        mean_step_s = self._step_s / self._steps
        self._steps, self._data_s, self._step_s = 0, 0.0, 0.0
        if share <= WAIT_SHARE or mean_s <= WAIT_S:
            return None
        self._told = True
        remedy = "put the data on faster storage, or raise data.prefetch where reading is uneven"
        if self._ahead == 0:
            remedy = "set data.prefetch=2"
        return f"steps wait for data: {mean_s:.3f} of {mean_step_s:.3f} s each, {share:.0%}; {remedy}"
