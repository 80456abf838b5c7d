"""Tensors without values: layers then take it that everything that depends on values is even, or complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_HAS_VALUES: ContextVar[bool] = ContextVar("has_values", default=True)


def has_values() -> bool:
    """Return whether the host may read values of tensors."""
    return _HAS_VALUES.get()


@contextmanager
def without_values() -> Iterator[None]:
    """Have layers within the block read no values: the tensors have shapes alone."""
    token = _HAS_VALUES.set(False)
    try:
        yield
    finally:
        _HAS_VALUES.reset(token)
