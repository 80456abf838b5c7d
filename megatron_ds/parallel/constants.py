"""Tensors that are made once and kept, whoever asks for them first."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

from torch.utils._python_dispatch import _disable_current_modes

Made = TypeVar("Made", bound=Callable[..., Any])


def kept(maxsize: int | None) -> Callable[[Made], Made]:
    """Keep a function's last results, which are or hold tensors: to copy one to a GPU makes the host wait.

    They are made outside of torch's modes: tensors without values, of a trace, must not be kept for a run.

    Args:
        maxsize: number of results; None = all.
    """

    def decorate(make: Made) -> Made:
        @lru_cache(maxsize=maxsize)
        @wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return make(*args, **kwargs)

        return made  # type: ignore[return-value]

    return decorate
