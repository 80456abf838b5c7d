"""Inputs of recomputed blocks in host memory between the forward and the backward pass (Rajbhandari et al. 2020, ZeRO).

Full recomputation keeps one (S, B, H) tensor of each block. Here each is copied to the host while the block runs, and
its memory on the device is free once the next block has begun. In the backward pass the input of a block is fetched
while the block after it is recomputed and differentiated. The last block's is still on the device.

On a GPU copies run on a stream of their own, to and from pinned memory. This has not been seen on a GPU. On a CPU they
are copies within the same memory, which save nothing: results are exact there, and tests count them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ds.parallel.messages import place_of


class Copies(Protocol):
    """Copies between a device and its host, which may run while the device computes."""

    def to_host(self, x: Tensor) -> Tensor:
        """Begin to copy `x`, and return the copy. The memory of `x` may be released at once."""

    def begin_fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy a tensor of `to_host` back to the device; return the copy, and an event for `wait`."""

    def wait(self, event: Any) -> None:
        """Have what the device computes next wait for the end of a copy to it."""


class CPUCopies:
    """Copies within the memory of the host, complete when they return."""

    def to_host(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def begin_fetch(self, host: Tensor) -> tuple[Tensor, None]:
        return host.clone(), None

    def wait(self, event: None) -> None:
        pass


class StreamCopies:
    """Copies on a stream of their own; the copies of one tensor are in order, because there is one stream.

    Args:
        device: an accelerator with streams, such as a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._backend = device, torch.get_device_module(device)
        self._stream = self._backend.Stream(device)

    def to_host(self, x: Tensor) -> Tensor:
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        self._stream.wait_stream(self._backend.current_stream(self._device))  # which computes x
        with self._backend.stream(self._stream):
            host.copy_(x.detach(), non_blocking=True)
        x.record_stream(self._stream)  # its memory is not used again before it has been read
        return host

    def begin_fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begin to copy a tensor of `to_host` back to the device, to memory that no earlier work still reads."""
        fetched = torch.empty_like(host, device=self._device)
        self._stream.wait_stream(self._backend.current_stream(self._device))
        with self._backend.stream(self._stream):
            fetched.copy_(host, non_blocking=True)
            event = self._stream.record_event()
        fetched.record_stream(self._stream)
        return fetched, event

    def wait(self, event: Any) -> None:
        self._backend.current_stream(self._device).wait_event(event)


def copies_of(device: torch.device) -> Copies:
    """Return the copies between a device and its host."""
    return CPUCopies() if device.type == "cpu" else StreamCopies(device)


@dataclass(eq=False)
class _Kept:
    """A tensor that is kept in host memory.

    Attributes:
        host: the copy there.
        on_device: the tensor itself until the next one is kept, or a copy that is being fetched; None = neither.
        event: the end of that copy; None = nothing to wait for.
        previous: the tensor that was kept before it, which is needed after it.
        is_used: it has been needed, and is not fetched ahead of time again.
    """

    host: Tensor
    on_device: Tensor | None
    event: Any
    previous: weakref.ref[_Kept] | None
    is_used: bool = False


class HostOffload:
    """The tensors that are kept in host memory, in the order of the forward pass.

    A tensor is fetched when the one that was kept after it is used. Where several micro-batches are on their way, as in
    a pipeline, the last block's of all but the newest is fetched only when it is needed.

    Args:
        copies: between the device of the activations and the host.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._newest: weakref.ref[_Kept] | None = None

    @contextmanager
    def keeping(self, x: Tensor) -> Iterator[None]:
        """Have autograd keep `x` in host memory, if an operation within the block saves it. All others stay."""
        place, shape = place_of(x), x.shape  # not x itself, which autograd would hold with this function

        def pack(saved: Tensor) -> Tensor | _Kept:
            return self._keep(saved) if (place_of(saved), saved.shape) == (place, shape) else saved

        def unpack(packed: Tensor | _Kept) -> Tensor:
            return self._use(packed) if isinstance(packed, _Kept) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _keep(self, x: Tensor) -> _Kept:
        before = self._newest() if self._newest is not None else None
        if before is not None and before.event is None:
            before.on_device = None
        kept = _Kept(self._copies.to_host(x), x.detach(), None, self._newest)
        self._newest = weakref.ref(kept)
        return kept

    def _use(self, kept: _Kept) -> Tensor:
        found = self._begin_fetch(kept)
        if kept.event is not None:
            self._copies.wait(kept.event)
        kept.on_device, kept.event, kept.is_used = None, None, True
        before = kept.previous() if kept.previous is not None else None
        if before is not None and not before.is_used:
            self._begin_fetch(before)
        return found

    def _begin_fetch(self, kept: _Kept) -> Tensor:
        """Return the tensor, to which a copy may still be running."""
        if kept.on_device is None:
            kept.on_device, kept.event = self._copies.begin_fetch(kept.host)
        return kept.on_device
