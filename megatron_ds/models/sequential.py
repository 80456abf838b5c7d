"""A model as a list of stages: the one description from which plain and pipelined models are made.

A stage takes and gives a *wire*: tensors by name, all that travels from one stage to the next. Some are hidden states,
others columns of the batch (ids, masks) that this stage or a later one reads. Each stage declares what it takes, and
that is all that an engine knows of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_ds.parallel.regions import HEAD, part

Activations = dict[str, Tensor]
"""Columns (B, ...) of integers; hidden states (S, B, H), or this rank's (S/t, B, H)."""

HIDDEN = "hidden"


@dataclass(frozen=True)
class LayerSpec:
    """One stage, not built yet.

    Attributes:
        name: prefix of its parameters' names, such as "embedding" or "blocks.3".
        build: allocates the module, `forward(wire) -> wire`. The last stage is a `OutputHead`.
        hidden: the hidden states that it takes: name on the wire -> the column of ids whose positions they are of.
        columns: the columns of the batch that it or a later stage takes, where the batch has them.
        labels: the columns that the last stage compares with, one term of the loss each.
        cost: forward work relative to other stages, for balancing a pipeline.
        is_block: one of the layers of which every pipeline stage gets at least one.
        tied: own parameter's name -> name in the model of an earlier stage's parameter that it is the same as.
    """

    name: str
    build: Callable[[], nn.Module]
    hidden: Mapping[str, str] = field(default_factory=lambda: {HIDDEN: "input_ids"})
    columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    cost: float = 0.0
    is_block: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)


class OutputHead(nn.Module, ABC):
    """The last stage: turns hidden states into losses without leaving logits behind.

    Loss and head are one call, because DeepSpeed starts a backward pass (and clears bf16 gradients) when the gradient
    reaches what the module returned: a parameter used after that, in a loss function, would lose its gradient.
    """

    def forward(self, activations: Activations, labels: Mapping[str, Tensor] | None = None) -> Tensor | Activations:
        """With labels: the fp32 sums of losses, (terms,), in the order of `LayerSpec.labels`, 0 for a column that is
        not there. Without: what the model predicts, by name, such as "logits" (B, S, V)."""
        with part(HEAD):
            return self.outputs(activations) if labels is None else self.losses(activations, labels)

    @abstractmethod
    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> Tensor: ...

    @abstractmethod
    def outputs(self, activations: Activations) -> Activations: ...


class SequentialModel(nn.Module):
    """All stages in one process, under the names that a pipeline gives them too."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        super().__init__()
        self.order = [spec.build() for spec in specs]
        self.columns = specs[0].columns
        register_layers(self, specs, self.order)

    def forward(self, batch: Mapping[str, Tensor], labels: Mapping[str, Tensor] | None = None) -> Tensor | Activations:
        """The batch's columns, each (B, ...) -> as `OutputHead.forward`."""
        activations = input_activations(batch, self.columns)
        for layer in self.order[:-1]:
            activations = layer(activations)
        return self.order[-1](activations, labels)


def input_activations(batch: Mapping[str, Tensor], columns: Iterable[str]) -> Activations:
    """What enters the first stage: the columns that the batch has, masks as bytes."""
    found = {name: batch[name] for name in columns if name in batch}
    return {name: column.to(torch.uint8) if column.dtype == torch.bool else column for name, column in found.items()}


def register_layers(parent: nn.Module, specs: Sequence[LayerSpec], layers: Sequence[nn.Module]) -> dict[str, str]:
    """Register stages under their names, and make tied parameters one where both are here.

    Returns:
        of parameters that are tied to one of a stage that is not here: name -> name in the model. If there are several
        such, they are the same, under the first one's name.
    """
    renamed: dict[str, str] = {}
    for spec, layer in zip(specs, layers):
        _register(parent, spec.name, layer)
        for own, original in spec.tied.items():
            first = next((name for name, target in renamed.items() if target == original), original)
            if _has_parameter(parent, first):
                owner, _, leaf = own.rpartition(".")
                setattr(layer.get_submodule(owner), leaf, parent.get_parameter(first))
            else:
                renamed[f"{spec.name}.{own}"] = original
    return renamed


def _has_parameter(parent: nn.Module, name: str) -> bool:
    return any(name == there for there, _ in parent.named_parameters(remove_duplicate=False))


def _register(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` a submodule of `parent` under a dotted name, creating plain containers on the way."""
    *containers, leaf = name.split(".")
    for container in containers:
        if container not in parent._modules:
            parent.add_module(container, nn.Module())
        parent = parent.get_submodule(container)
    parent.add_module(leaf, module)
