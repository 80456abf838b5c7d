"""Functions that all ranks call when rank 0 does, which alone knows the next arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_ds.parallel.consensus import share_object


class SharedCalls:
    """Collective functions by name. Rank 0 calls them, while the other ranks are in `serve`."""

    def __init__(self) -> None:
        self._functions: dict[str, Callable[..., Any]] = {}
        self._is_calling = False

    def add(self, name: str, function: Callable[..., Any]) -> None:
        """Add a function, on every rank. Its arguments are pickled; its result on rank 0 counts."""
        self._functions[name] = function

    def call(self, name: str, *arguments: Any) -> Any:
        """Return the result of a function that every rank calls with these arguments. Called on rank 0."""
        self._is_calling = True
        share_object((name, arguments))
        result = self._functions[name](*arguments)
        self._is_calling = False
        return result

    def serve(self) -> None:
        """Call what rank 0 calls, until it stops. Called on the other ranks."""
        while (called := share_object(None)) is not None:
            name, arguments = called
            self._functions[name](*arguments)

    def stop(self) -> None:
        """End `serve` on the other ranks, unless an error has left them in the middle of a call. Called on rank 0."""
        if not self._is_calling:
            share_object(None)
