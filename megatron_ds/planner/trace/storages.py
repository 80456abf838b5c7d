"""Memory of tensors as it is allocated and released: of real runs on a CPU, and of traces, by the same rule."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operations within the block have made and that are still alive.

    A storage counts once, however many views it has, from the operation that returns it until its last reference is
    gone. Storages that existed before do not count, nor does memory that a kernel uses while it runs. What is made on
    other threads does not count; autograd's on a CPU are this one.

    Attributes:
        live_bytes: now.
        peak_bytes: the most since the beginning, or since `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._sizes: dict[int, int] = {}  # address of a storage -> bytes that count

    def reset_peak(self) -> None:
        """Begin the search for the peak again, from the memory that is alive now."""
        self.peak_bytes = self.live_bytes

    def leave_out(self, tensor: Tensor) -> None:
        """Have a tensor's memory not count, because it is somewhere else, such as on the host."""
        self._resize(tensor.untyped_storage()._cdata, 0)

    def size_of(self, tensor: Tensor) -> int:
        """Return the bytes of a tensor's storage that count."""
        return self._sizes.get(tensor.untyped_storage()._cdata, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs))} if _may_alias(func) else ()
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._sizes:
                if self._sizes[key] and self._sizes[key] != storage.nbytes():
                    self._resize(key, storage.nbytes())
            elif key not in given:
                self._sizes[key] = 0
                weakref.finalize(storage, self._release, key)
                self._resize(key, storage.nbytes())
        return result

    def _resize(self, key: int, num_bytes: int) -> None:
        self.live_bytes += num_bytes - self._sizes.get(key, 0)
        self._sizes[key] = num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _release(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)


def _may_alias(func: Any) -> bool:
    """Return whether an operation may return memory that it was given; `lift_fresh` returns what nobody has seen."""
    return func is not torch.ops.aten.lift_fresh.default


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
