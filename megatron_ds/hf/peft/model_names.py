"""The names of a model's modules and parameters in place of the model, for functions of peft that read nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn


class ModelNames:
    """A stand-in for a model of transformers.

    Args:
        config: its config.
        linear: names of its linear layers, without those of the vocabulary.
        tensors: names of all its tensors in memory.
    """

    def __init__(self, config: Any, linear: Collection[str], tensors: Sequence[str]) -> None:
        self.config, self._linear, self._tensors = config, linear, tensors

    def named_parameters(self) -> Iterator[tuple[str, None]]:
        """Yield each name without a parameter."""
        return ((name, None) for name in dict.fromkeys(self._tensors))

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield each name with an empty module, which is linear where the model's is."""
        names: dict[str, None] = {}
        for tensor in self._tensors:
            parts = tensor.split(".")[:-1]
            names |= dict.fromkeys(".".join(parts[:count]) for count in range(1, len(parts) + 1))
        other, linear = nn.Identity(), nn.Linear(1, 1, device="meta")
        return ((name, linear if name in self._linear else other) for name in names)
