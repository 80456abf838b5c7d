"""Host memory that a snapshot is copied to, and the copies, which on a GPU run while training continues.

One arena holds the whole snapshot, and the next save uses it again: memory that is new to the process costs several
times as much as copying. On a GPU the arena is page-locked, so that copies run at the bus's full speed and without the
host. torch's own page-locked memory is rounded up to a power of two, up to twice what a snapshot needs; here ordinary
memory is registered with CUDA instead.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_ds.checkpoint.files import TensorHeader
from megatron_ds.errors import CheckpointError

_ALIGNMENT = 64
MAX_TEMPORARY_BYTES = 2**30  # gathered tensors that may wait on a GPU until they are copied


class Copies:
    """Copies from a device to host memory that end before `copy` returns: on a CPU. Others are derived from it.

    Attributes:
        is_deferred: whether copies may end later; a tensor must then keep its values until `hold_back` or `wait` has
            returned.
    """

    is_deferred = False

    def lock(self, memory: Tensor) -> Callable[[], Any]:
        """Make host memory, (n,) uint8, fit for the copies; returns a function that undoes it."""
        return lambda: None

    def copy(self, place: Tensor, tensor: Tensor, *, is_temporary: bool) -> None:
        """Copy a tensor.

        Args:
            place: on the host, of the tensor's shape and dtype.
            tensor: on any device.
            is_temporary: whether its memory was allocated for this copy and will be free after it.
        """
        place.copy_(tensor)

    def finish(self) -> None:
        """Mark the end of a snapshot: `hold_back` and `wait` are about the copies up to here."""

    def hold_back(self) -> None:
        """Let all work that the device gets from now on begin after the copies. The host need not wait."""

    def wait(self) -> None:
        """Wait until the copies have been made; may be called by another thread."""


class StreamCopies(Copies):
    """Copies on a CUDA stream of their own.

    The stream waits for the current one, on which the values were computed. The current one waits for it in
    `hold_back` alone, so that the next forward and backward passes run while the copies do.

    Args:
        device: the GPU.
    """

    is_deferred = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._end = torch.cuda.Event()
        self._waiting = deque[tuple[torch.cuda.Event, int]]()  # temporary tensors, with their bytes

    def lock(self, memory: Tensor) -> Callable[[], Any]:
        """Page-lock the memory.

        Raises:
            CheckpointError: CUDA refuses it.
        """
        cudart, address = torch.cuda.cudart(), memory.data_ptr()
        status = int(cudart.cudaHostRegister(address, memory.nbytes, 0))
        if status:
            raise CheckpointError(
                f"checkpoint.asynchronous=true needs {memory.nbytes / 1e9:,.1f} GB of page-locked memory on this rank, "
                f"which CUDA refuses (cudaHostRegister: error {status}); try checkpoint.asynchronous=false"
            )
        return lambda: cudart.cudaHostUnregister(address)

    def copy(self, place: Tensor, tensor: Tensor, *, is_temporary: bool) -> None:
        """Enqueue the copy; a tensor on the host, of an offloaded optimizer, is copied at once."""
        if not tensor.is_cuda:
            place.copy_(tensor)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            place.copy_(tensor, non_blocking=True)
        if is_temporary:
            tensor.record_stream(self._stream)  # its memory is not used again before it is copied
            self._bound_temporaries(tensor.nbytes)

    def finish(self) -> None:
        """Record the end of the copies."""
        self._end.record(self._stream)
        self._waiting.clear()

    def hold_back(self) -> None:
        """Let the current stream wait for the copies."""
        torch.cuda.current_stream(self._device).wait_event(self._end)

    def wait(self) -> None:
        """Wait for the copies on the host."""
        with torch.cuda.device(self._device):  # a thread of its own would start CUDA on the first GPU
            self._end.synchronize()

    def _bound_temporaries(self, num_bytes: int) -> None:
        """Wait for the oldest copies as long as more than `MAX_TEMPORARY_BYTES` are waiting."""
        self._waiting.append((self._stream.record_event(), num_bytes))
        while len(self._waiting) > 1 and sum(size for _, size in self._waiting) > MAX_TEMPORARY_BYTES:
            self._waiting.popleft()[0].synchronize()


class HostMemory:
    """An arena for the copies of one snapshot.

    Args:
        copies: how tensors are copied.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._arena, self._used = torch.empty(0, dtype=torch.uint8), 0
        self._unlock: Callable[[], Any] = lambda: None

    @property
    def is_deferred(self) -> bool:
        """True if tensors must keep their values until `hold_back` or `wait`."""
        return self._copies.is_deferred

    @property
    def bytes(self) -> int:
        """Size of the arena."""
        return self._arena.nbytes

    def reserve(self, headers: Iterable[TensorHeader]) -> None:
        """Begin a snapshot of tensors like these, in an arena that is large enough. The last one must be written."""
        needed, self._used = sum(_padded(header.bytes) for header in headers), 0
        if needed <= self._arena.nbytes:
            return
        self._unlock()
        self._arena = torch.empty(0, dtype=torch.uint8)  # freed before the new one is allocated
        self._arena = torch.empty(needed, dtype=torch.uint8)
        self._unlock = weakref.finalize(self, self._copies.lock(self._arena))
        self._unlock.atexit = False  # CUDA may have ended by then

    def copy(self, tensor: Tensor, *, is_temporary: bool) -> Tensor:
        """Copy a tensor to the arena. The copy is complete when `wait` returns.

        Args:
            tensor: the tensor.
            is_temporary: see `Copies.copy`.

        Returns:
            its place in the arena, contiguous.
        """
        end = self._used + math.prod(tensor.shape) * tensor.dtype.itemsize
        place = self._arena[self._used : end].view(tensor.dtype).view(tensor.shape)
        self._used = _padded(end)
        self._copies.copy(place, tensor.detach(), is_temporary=is_temporary)
        return place

    def finish(self) -> None:
        """End the snapshot."""
        self._copies.finish()

    def hold_back(self) -> None:
        """Let the device's further work begin after the copies; before the first snapshot nothing is waited for."""
        self._copies.hold_back()

    def wait(self) -> None:
        """Wait until the snapshot is complete."""
        self._copies.wait()


def copies_for(device: torch.device) -> Copies:
    """Return the copies from a device."""
    return StreamCopies(device) if device.type == "cuda" else Copies()


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
