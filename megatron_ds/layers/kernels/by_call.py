"""Choice among several kernels of one operation, call by call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Entry:
    """A kernel, and the calls that it computes.

    Attributes:
        name: of its candidate.
        supports: (the kernel's arguments) -> whether it computes this call.
        kernel: (the kernel's arguments) -> the kernel, which may be made and checked only now.
    """

    name: str
    supports: Callable[..., bool]
    kernel: Callable[..., Kernel | None]


class KernelsByCall:
    """Kernels of one operation in order of preference, each for the calls that it supports."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    def find(self, *arguments: Any) -> Kernel | None:
        """Return the first kernel that computes a call with these arguments; None = the layer's PyTorch code.

        Raises:
            ConfigError: the kernel is made only now, and its results differ from the reference's.
        """
        for entry in self.entries:
            if entry.supports(*arguments):
                kernel = entry.kernel(*arguments)
                if kernel is not None:
                    return kernel
        return None


@dataclass
class Deferred:
    """A kernel that is made and checked when it is first needed, once for each variant of the call.

    Code that torch.compile traces cannot do that: there it is not used before it has been checked.

    Attributes:
        variant: (the kernel's arguments) -> the options of the call that need a check of their own.
        make: (the kernel's arguments) -> the kernel, checked with such a call.
    """

    variant: Callable[..., Hashable]
    make: Callable[..., Kernel]
    _made: dict[Hashable, Kernel] = field(default_factory=dict)

    def __call__(self, *arguments: Any) -> Kernel | None:
        variant = self.variant(*arguments)
        if variant not in self._made:
            if torch.compiler.is_compiling():
                return None
            self._made[variant] = _apart(self.make, *arguments)
        return self._made[variant]


def _apart(make: Callable[..., Kernel], *arguments: Any) -> Kernel:
    """Return `make(*arguments)` from a thread of its own.

    A check runs backward, which the caller may be unable to: without gradients, or inside recomputation, whose hooks on
    saved tensors belong to a thread.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make, *arguments).result()
