"""The signature of a module: equal for layers that compute the same on tensors of the same shapes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_PACKAGE = "megatron_ds.layers"
_SIMPLE = (bool, int, float, str, bytes, type(None), range, torch.dtype, torch.device, Enum, type)


def signature_of(module: nn.Module) -> Hashable:
    """Return what a module computes with: its class, options, parameters, and those of the modules inside.

    Objects of the layers are described by their fields, other objects that are no data are equal if they are the same.
    """
    own = {
        name: value
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules") and not name.startswith("_forward_")
    }
    tensors = {**module._parameters, **module._buffers}
    return (
        type(module),
        tuple((name, _value(value)) for name, value in sorted(own.items())),
        tuple((name, _value(value)) for name, value in tensors.items()),
        tuple((name, signature_of(one)) for name, one in module._modules.items() if one is not None),
    )


def _value(value: Any) -> Hashable:
    """Return an attribute as data that can be compared."""
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, nn.Module):
        return signature_of(value)
    if isinstance(value, partial):
        return _value(value.func), _value(value.args), _value(value.keywords)
    if isinstance(value, Mapping):
        return tuple((_value(name), _value(one)) for name, one in value.items())
    if isinstance(value, slice):
        return "slice", value.start, value.stop, value.step
    if isinstance(value, Sequence | set):
        return tuple(_value(one) for one in value)
    if callable(value):  # a method of the module itself, or a function
        return getattr(value, "__qualname__", type(value).__qualname__)
    if type(value).__eq__ is object.__eq__ and type(value).__module__.startswith(_PACKAGE):
        kept = {name: one for name, one in vars(value).items() if not isinstance(one, dict)}  # those are caches
        return type(value), _value(kept)
    if isinstance(value, Hashable) and _has_hash(value):
        return value
    assert is_dataclass(value), value
    return type(value), tuple((one.name, _value(getattr(value, one.name))) for one in fields(value))


def _has_hash(value: Hashable) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
