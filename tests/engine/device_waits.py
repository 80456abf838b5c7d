"""Count the places where a step waits for its device, on a CPU whose tensors count as the device's or as the host's.

On a GPU `torch.cuda.set_sync_debug_mode` does this. On a CPU every tensor is in host memory, so `DeviceWaits` follows
which of them would not be: a tensor belongs to the host if it was made while counting without a device, or for "cpu",
or from tensors of the host alone; all others belong to the device. Counted are values that leave the device (`item`,
`tolist`, `bool`, `numpy`, `cpu`), sizes that depend on values (`nonzero`, masks as indices), blocking copies to the
device (`torch.tensor(..., device=...)`, `to`, `copy_`), and calls of the accelerator's `synchronize`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME = "cpu:0"
"""The accelerator's device by name. "cpu" names the host; a `torch.device` is that of some tensor, so the device."""

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__")
DATA_DEPENDENT = (
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
)
FROM_VALUES = (torch.tensor, torch.as_tensor, torch.Tensor, torch.FloatTensor, torch.ByteTensor, torch.LongTensor)


class DeviceWaits:
    """A context that counts waits for the device; `places` has the lines of code of each.

    Args:
        host: tensors of the host that exist already, such as a data loader's batches.
    """

    def __init__(self, host: Iterable[Tensor] = ()) -> None:
        self.places: list[str] = []
        self._host: dict[int, StorageWeakRef] = {}
        self._stack = ExitStack()
        for tensor in host:
            self.give_to_host(tensor)

    def __enter__(self) -> DeviceWaits:
        accelerator = get_accelerator()
        for name, stands_for in (
            ("synchronize", lambda *_: self.count("synchronize")),
            ("current_device_name", lambda: NAME),
            ("device_name", lambda index=None: NAME),
        ):
            self._stack.enter_context(mock.patch.object(accelerator, name, stands_for))
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Calls(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def count(self, what: str) -> None:
        """Note a wait, with the two innermost lines of code that are not torch's."""
        lines = [
            f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack()
            if "/torch/" not in frame.filename and "device_waits" not in frame.filename
        ]
        self.places.append(" < ".join([what, *reversed(lines[-3:])]))

    def on_host(self, tensor: Tensor) -> bool:
        """Return whether the tensor would be in host memory."""
        return _key(tensor) in self._host

    def give_to_host(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._host[storage._cdata] = StorageWeakRef(storage)  # keeps the address from being used again

    def give_to_device(self, tensor: Tensor) -> None:
        self._host.pop(_key(tensor), None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(*trees: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor))


class _Operations(TorchDispatchMode):
    """Follow host tensors through operations, and count the data-dependent ones."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits, kwargs = self._waits, kwargs or {}
        given = list(_tensors(args, kwargs))
        name = func.overloadpacket.__name__
        of_host = bool(given) and all(waits.on_host(one) for one in given)
        if given and not of_host:
            if name in DATA_DEPENDENT or (name in ("index", "index_put_") and _has_mask(args[1])):
                waits.count(name)
            if (
                name == "copy_"
                and waits.on_host(args[1])
                and not waits.on_host(args[0])
                and not _non_blocking(args, kwargs)
            ):
                waits.count("copy to the device")
        result = func(*args, **kwargs)
        if of_host:
            for made in _tensors(result):
                waits.give_to_host(made)
        return result


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _non_blocking(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


class _Calls(TorchFunctionMode):
    """Count what leaves the device, and tell host and device apart where tensors are made or moved."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits, kwargs = self._waits, kwargs or {}
        name = getattr(func, "__name__", "")
        given = list(_tensors(args, kwargs))
        if name in READS and not waits.on_host(args[0]):
            waits.count(name)
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                result = result.clone()
                waits.give_to_host(result)
            return result
        to = _named_device(args, kwargs)
        if name == "to" and to is not None:
            return self._moved(func, args, kwargs, to)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and all(waits.on_host(one) for one in given):
            if to == "device":
                if func in FROM_VALUES:
                    waits.count(f"{name} from values")
                waits.give_to_device(result)
            elif not given or to == "host":
                waits.give_to_host(result)
        return result

    def _moved(self, func: Callable[..., Any], args: Any, kwargs: Any, to: str) -> Tensor:
        waits, source = self._waits, args[0]
        was_host = waits.on_host(source)
        result: Tensor = func(*args, **kwargs)
        if was_host == (to == "host"):
            return result
        if not (kwargs.get("non_blocking") and was_host):
            waits.count("to the device" if was_host else "to the host")
        moved = result.clone() if result is source or _key(result) == _key(source) else result
        (waits.give_to_device if was_host else waits.give_to_host)(moved)
        return moved


def _named_device(args: Any, kwargs: Any) -> str | None:
    """Return "device" or "host", whichever a call names; None if it names neither."""
    for value in (kwargs.get("device"), *args[1:]):
        if isinstance(value, torch.device) or value == NAME:
            return "device"
        if isinstance(value, str) and value == "cpu":
            return "host"
    return None
