"""A model as a list of stages: the one description from which plain and pipelined models are made.

A stage takes and gives a *wire*: a tuple of tensors, all that travels from one stage to the next. The first is the
one that a stage transforms (token ids, then hidden states); the others (integers: masks) pass through unchanged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Wire = tuple[Tensor, ...]


@dataclass(frozen=True)
class StageSpec:
    """One stage, not built yet.

    Attributes:
        name: prefix of its parameters' names, such as "embedding" or "blocks.3".
        build: allocates the module, `forward(wire) -> wire`. The last stage is a `LossStage`.
        cost: forward work relative to other stages, for balancing a pipeline.
        tied_to: name of an earlier stage whose `weight` this stage's `weight` is; both then are one parameter, under
            the earlier stage's name.
    """

    name: str
    build: Callable[[], nn.Module]
    cost: float = 0.0
    tied_to: str | None = None


class LossStage(nn.Module, ABC):
    """The last stage: turns hidden states into a loss without leaving logits behind.

    Loss and head are one call, because DeepSpeed starts a backward pass (and clears bf16 gradients) when the gradient
    reaches what the module returned: a parameter used after that, in a loss function, would lose its gradient.
    """

    weight: nn.Parameter

    @abstractmethod
    def forward(self, wire: Wire, targets: Tensor | None = None) -> Tensor:
        """Wire, targets (B, S) -> fp32 sum of the labelled tokens' losses; without targets -> (B, S, V) logits."""


class StageModel(nn.Module):
    """All stages in one process, under the names that a pipeline gives them too."""

    def __init__(self, specs: Sequence[StageSpec]) -> None:
        super().__init__()
        self.order: list[nn.Module] = []
        for spec in specs:
            stage = spec.build()
            register(self, spec.name, stage)
            if spec.tied_to is not None:
                stage.weight = self.get_submodule(spec.tied_to).weight
            self.order.append(stage)

    def forward(self, wire: Wire, targets: Tensor | None = None) -> Tensor:
        """Wire of (B, S) integers, targets (B, S) -> fp32 sum of token losses; without targets -> logits (B, S, V)."""
        for stage in self.order[:-1]:
            wire = stage(wire)
        return self.order[-1](wire, targets)


def register(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` a submodule of `parent` under a dotted name, creating plain containers on the way."""
    *containers, leaf = name.split(".")
    for part in containers:
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(leaf, module)
