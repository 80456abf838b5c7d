"""Results of torch's operators on tensors without values, which depend on the sizes of what they get alone.

torch finds many of them by decompositions in Python, which take up to a millisecond a call. A trace calls the same
operator on the same sizes over and over, in the chunks of a head, and a search makes hundreds of traces.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.planner.trace.storages import tensors_in

_TENSORS = frozenset({Tensor, nn.Parameter})
_VALUES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


class _NotAlike(Exception):
    """An argument is no tensor of the meta device, and no plain value."""


@dataclass(frozen=True)
class _New:
    """Memory that an operator allocates."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class _Given:
    """An argument that an operator changes in place and returns: its position, or its name."""

    key: int | str


_Result = _New | _Given | tuple[_New, ...]


class OperatorResults:
    """Calls operators, and repeats what they return where it is known.

    That is so for operators that allocate all that they return, or return the tensor that they change in place; their
    tensors are on torch's meta device. Views, and tensors with memory, are left to torch.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, _Result | None] = {}

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operator does, by the arguments of `__torch_dispatch__`."""
        if func.namespace != "aten" or func.is_view:
            return func(*args, **kwargs)
        try:
            key = func, _alike(args), tuple((name, _alike(value)) for name, value in kwargs.items())
        except _NotAlike:
            return func(*args, **kwargs)
        if key not in self._known:
            before = [(one.shape, one.stride(), _storage_bytes(one)) for one in _tensors(args, kwargs)]
            result = func(*args, **kwargs)
            is_same = before == [(one.shape, one.stride(), _storage_bytes(one)) for one in _tensors(args, kwargs)]
            self._known[key] = _described(result, args, kwargs) if is_same else None
            return result
        known = self._known[key]
        if known is None:
            return func(*args, **kwargs)
        if isinstance(known, tuple):
            return tuple(one.make() for one in known)
        if isinstance(known, _New):
            return known.make()
        return args[known.key] if isinstance(known.key, int) else kwargs[known.key]


def _alike(value: Any) -> Hashable:
    """Return an argument as data that are equal where the results are.

    Raises:
        _NotAlike: the argument has no such data.
    """
    kind = type(value)
    if kind in _TENSORS:
        if value.device.type != "meta" or value.dtype.is_complex or value.layout != torch.strided:
            raise _NotAlike
        return value.shape, value.stride(), value.dtype
    if kind in _VALUES:
        return kind, value
    if kind in (list, tuple):
        return tuple([_alike(one) for one in value])
    raise _NotAlike


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that are tensors themselves, not in lists: others are not changed in place."""
    return [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]


def _storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _described(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Result | None:
    """Return how to make the result of a call again; None = it must be called."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in given:
        if result is value and isinstance(result, Tensor):
            return _Given(key)
    every = list(tensors_in(given))
    addresses = [one.untyped_storage()._cdata for one in every]
    parts = result if isinstance(result, tuple) else (result,)
    found = []
    for one in parts:
        if type(one) is not Tensor or one.device.type != "meta" or one.untyped_storage()._cdata in addresses:
            return None
        new = _New(tuple(one.shape), one.stride(), one.dtype)
        if one.storage_offset() or _storage_bytes(new.make()) != _storage_bytes(one):
            return None
        addresses.append(one.untyped_storage()._cdata)
        found.append(new)
    return tuple(found) if isinstance(result, tuple) else found[0]
