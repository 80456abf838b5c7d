"""Seconds that this rank waits for others, measured where torch waits for a collective or a message.

Each collective of `torch.distributed` is waited for in `Work.wait`, by torch itself or, if it overlaps with
computation, by the caller, so that replacing this method for a while sees all of them, DeepSpeed's too. On a CPU the
call takes as long as the rank waits. On CUDA it returns at once and has the current stream wait; then two events around
it measure how long the stream stood still.

Not seen are sums of `parallel.shared_memory`, collectives in graphs of `torch.compile`, and streams other than that of
the computation, on which ZeRO-3 gathers weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from megatron_ds.parallel.neighbours import Neighbours

WAITS = ((dist.Work, "wait"), (Neighbours, "meet"))
"""Methods in which a rank waits for others: those of torch, and of ranks that exchange through memory."""


class CommunicationClock:
    """The seconds of waiting in blocks of `measuring`, added up.

    Args:
        device: the device of this rank's tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._host_s = device, 0.0
        self._events: list[tuple[Any, Any]] = []

    def take(self) -> float:
        """Return the seconds since the last call; the device must have finished the measured work, or is waited for."""
        if self._events:
            self._events[-1][1].synchronize()
        waited_s = self._host_s + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        self._host_s = 0.0
        self._events.clear()
        return waited_s

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure within the block, in this thread and in those of torch's backward pass."""
        given = [getattr(owner, name) for owner, name in WAITS]
        for (owner, name), method in zip(WAITS, given):
            setattr(owner, name, self._measured(method))
        try:
            yield
        finally:
            for (owner, name), method in zip(WAITS, given):
                setattr(owner, name, method)

    def _measured(self, given: Callable[..., Any]) -> Callable[..., Any]:
        measure = self._on_stream if self._device.type == "cuda" else self._on_host

        @wraps(given)
        def wait(*args: Any, **options: Any) -> Any:
            return measure(given, *args, **options) if _is_own_thread() else given(*args, **options)

        return wait

    def _on_host(self, given: Any, *args: Any, **options: Any) -> Any:
        began_s = time.perf_counter()
        try:
            return given(*args, **options)
        finally:
            self._host_s += time.perf_counter() - began_s

    def _on_stream(self, given: Any, *args: Any, **options: Any) -> Any:
        if torch.cuda.current_stream() != torch.cuda.default_stream():
            return given(*args, **options)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        try:
            return given(*args, **options)
        finally:
            end.record()
            self._events.append((begin, end))


def _is_own_thread() -> bool:
    """Return False in threads that Python code has started, such as that of a checkpoint being written."""
    thread = threading.current_thread()
    return thread is threading.main_thread() or isinstance(thread, threading._DummyThread)
