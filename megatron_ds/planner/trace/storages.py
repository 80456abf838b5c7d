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

    Args:
        device_type: of the tensors that count, such as "cpu"; None = all, also those of torch's meta device.

    Attributes:
        live_bytes: now.
        peak_bytes: the most since the beginning, or since `reset_peak`.
        left_out_bytes: of storages that are alive and do not count; see `leave_out`.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self._device_type = device_type
        self.live_bytes = self.peak_bytes = self.left_out_bytes = 0
        self._serials: dict[int, int] = {}  # address of a storage, which another one may have later -> its number
        self._sizes: dict[int, int] = {}  # number of a storage -> bytes that count
        self._num_storages = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: torch.compile works within the block, and its graphs run there."""
        return True

    def reset_peak(self) -> None:
        """Begin the search for the peak again, from the memory that is alive now."""
        self.peak_bytes = self.live_bytes

    def leave_out(self, tensor: Tensor) -> None:
        """Have a tensor's memory count in `left_out_bytes` alone, because it is somewhere else, such as on the host."""
        storage = tensor.untyped_storage()
        self._resize(self._serials[storage._cdata], 0)
        self._leave_out(storage.nbytes())
        weakref.finalize(storage, self._leave_out, -storage.nbytes())

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that was made where a mode sees nothing, such as in compiled code."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._serials:
            self._begin(storage, storage._cdata)

    def serial_of(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage, in the order in which they were made; None = it does not count."""
        return self._serials.get(tensor.untyped_storage()._cdata)

    def size_of(self, tensor: Tensor) -> int:
        """Return the bytes of a tensor's storage that count."""
        return self._sizes.get(self._serials.get(tensor.untyped_storage()._cdata, -1), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._call(func, args, kwargs or {})
        given: set[int] | None = None
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self._serials:
                serial = self._serials[address]
                if self._sizes[serial] and self._sizes[serial] != storage.nbytes():
                    self._resize(serial, storage.nbytes())
            elif self._device_type in (None, tensor.device.type):
                if given is None:
                    found = tensors_in((args, kwargs)) if _may_alias(func) else ()
                    given = {one.untyped_storage()._cdata for one in found}
                if address not in given:
                    self._begin(storage, address)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operation."""
        return func(*args, **kwargs)

    def _begin(self, storage: torch.UntypedStorage, address: int) -> None:
        self._num_storages += 1
        serial = self._serials[address] = self._num_storages
        self._sizes[serial] = 0
        weakref.finalize(storage, self._release, address)
        self._resize(serial, storage.nbytes())

    def _resize(self, serial: int, num_bytes: int) -> None:
        before, self._sizes[serial] = self._sizes[serial], num_bytes
        self._change(serial, num_bytes - before)

    def _release(self, address: int) -> None:
        serial = self._serials.pop(address)
        self._change(serial, -self._sizes.pop(serial))

    def _change(self, serial: int, num_bytes: int) -> None:
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _leave_out(self, num_bytes: int) -> None:
        self.left_out_bytes += num_bytes


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
