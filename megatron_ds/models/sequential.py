"""A model as a list of layers: the one description from which plain and pipelined models are built.

Each layer maps a dict of named tensors, the activations, to another. Some are hidden states, others columns of the
batch (ids, masks) that this layer or a later one reads. A `LayerSpec` declares what its layer takes; the last one also
declares, in a `HeadSpec`, which labels the output head reads and which loss terms and metrics it returns. That is all
that an engine knows of a model.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor, nn

from megatron_ds.columns import COLUMNS, Column, find_column
from megatron_ds.errors import ConfigError
from megatron_ds.models.context import BuildContext
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.regions import HEAD, profiled

Activations = dict[str, Tensor]
"""Columns (B, ...) of integers, of whole rows; hidden states (S, B, H), or (S/t, B, H) under sequence parallelism.

Of c context ranks each has the hidden states of S/c positions instead of S.
"""

HIDDEN = "hidden"


def count_entries(labels: Mapping[str, Tensor]) -> Tensor:
    """Count the labels of each column.

    Args:
        labels: columns by name, each (B, ...).

    Returns:
        int64 (columns,): number of entries that carry loss, as the column is declared; numel() if it has no ignored
        value.
    """
    return torch.tensor([_count(name, column) for name, column in labels.items()], dtype=torch.int64)


def _count(name: str, column: Tensor) -> int:
    ignored = find_column(name).ignored
    if ignored is None:
        return column.numel()
    return int((~column.isnan() if math.isnan(ignored) else column != ignored).sum())


def positions_of(column: str) -> str:
    """Return the name under which a head finds where a column of labels has labels; see `HeadSpec.with_own_labels`."""
    return f"{column}.positions"


def own_of(column: str) -> str:
    """Return the name of a column of labels cut to a context rank's tokens; see `HeadSpec.with_own_labels`."""
    return f"{column}.own"


def _own_labels(labels: Tensor, column: Column, context: ContextParallel, rank: int) -> Tensor:
    """Return the labels of a context rank's tokens, or of samples on the first context rank.

    Raises:
        ConfigError: labels of a sample have no value that carries no loss.
    """
    if context.axis.size == 1:
        return labels
    if column.has_positions:
        runs = context.runs(labels.shape[1], rank)
        return torch.cat([labels[:, run.start : run.stop] for run in runs], dim=1)
    if column.ignored is None:
        raise ConfigError(
            f"parallel.context={context.axis.size}: labels {column.name} carry loss on one context rank alone, and "
            f"have no value that carries none; try Column({column.name!r}, ..., ignored=-1)"
        )
    return labels if rank == 0 else torch.full_like(labels, column.ignored)


@dataclass(frozen=True)
class HeadSpec:
    """Declaration of an output head's labels, loss terms and metrics, which every pipeline rank has.

    The loss of a global batch is the sum of its terms. A term is the sum of the losses that the head returns under its
    name, over all micro-batches and data ranks, divided by the number of labels that `count_labels` finds in them.

    Attributes:
        label_columns: columns of the batch that the losses read; they bypass the model's other layers.
        terms: names of the loss terms, in order. Labels of the first one are the tokens that a run counts.
        count_labels: label columns of a micro-batch, each (B, ...) -> int64 (terms,), the labels of each term.
        metrics: names of averages that the head returns besides its losses, to be logged.
        num_tallies: length of a vector of counts that the head returns, which is summed over the global batch.
        num_kept: how many numbers of each sample validation keeps, for metrics that need all samples at once.
        summarize: (summed counts, kept numbers (samples, num_kept)) -> further metrics by name.
        check: refuses a micro-batch, in host memory, for which the head is not defined.
        padding_id: an id that the head passes over behind a text; None = it takes every id for text.
        divides_labels: context ranks get the labels of their tokens; else whole columns, of which the head takes its
            own part.
    """

    label_columns: tuple[str, ...]
    terms: tuple[str, ...]
    count_labels: Callable[[Mapping[str, Tensor]], Tensor] = count_entries
    metrics: tuple[str, ...] = ()
    num_tallies: int = 0
    num_kept: int = 0
    summarize: Callable[[np.ndarray, np.ndarray], Mapping[str, float]] = lambda tallies, kept: {}
    check: Callable[[Mapping[str, Tensor]], None] = lambda batch: None
    padding_id: int | None = 0
    divides_labels: bool = True

    @classmethod
    def per_column(cls, *columns: str) -> HeadSpec:
        """Return the declaration of a head with one loss term for each label column, under the column's name."""
        return cls(columns, columns)

    def with_own_labels(self, batch: Mapping[str, Tensor], context: ContextParallel) -> dict[str, Tensor]:
        """Add to a micro-batch in host memory this rank's labels and where they are, so that a head need not ask.

        For each label column of an entry a position, (B, S), of which some carry no loss: `positions_of` it, int64
        (labels,), the indices of those that do in the transposed column, (S/c, B), flattened. Context ranks get, under
        `own_of` its name, the labels of their tokens, (B, S/c). Labels of a sample carry loss on the first one alone.
        Columns that are not declared stay as they are.
        """
        found = dict(batch)
        for name, labels in self._own_part(batch, context, context.axis.rank).items():
            column = find_column(name)
            if context.axis.size > 1:
                found[own_of(name)] = labels.pin_memory() if batch[name].is_pinned() else labels
            if column.has_positions and column.ignored is not None and labels.dim() == 2:
                positions = (labels.t().flatten() != column.ignored).nonzero().squeeze(1)
                found[positions_of(name)] = positions.pin_memory() if batch[name].is_pinned() else positions
        return found

    def _own_part(self, batch: Mapping[str, Tensor], context: ContextParallel, rank: int) -> dict[str, Tensor]:
        """Return a context rank's labels of each declared column."""
        declared = [name for name in self.label_columns if name in COLUMNS and self.divides_labels]
        return {name: _own_labels(batch[name], find_column(name), context, rank) for name in declared}

    def check_parts(self, given: Mapping[str, Tensor], padded: Mapping[str, Tensor], context: ContextParallel) -> None:
        """Refuse labels that are others in the parts of the context ranks than in whole rows, in host memory.

        So are labels that depend on their place in a row, columns that are not declared, and counts of all positions
        where some are padding.

        Args:
            given: a micro-batch as the data have it.
            padded: the same with the positions that make its rows divisible.
            context: the ranks that divide each sequence.

        Raises:
            ConfigError: the numbers of labels of the parts do not add up to that of the whole.
        """
        size = context.axis.size
        if size == 1 or not self.divides_labels:
            return
        whole = self.count_labels(self.labels_in(given)).tolist()
        parts = [{**self.labels_in(padded), **self._own_part(padded, context, rank)} for rank in range(size)]
        found = torch.stack([self.count_labels(part) for part in parts]).sum(0).tolist()
        if found != whole:
            terms = ", ".join(self.terms)
            raise ConfigError(
                f"parallel.context={size}: the output head counts {whole} labels of {terms} in a batch, and {found} in "
                "the parts of its rows that context ranks have; try parallel.context=1, or a head whose labels are of "
                "declared columns and do not depend on their place in a row"
            )

    def labels_in(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the label columns of a micro-batch, this rank's own if they have been added, and where labels are."""
        own = {name: batch[own_of(name)] if own_of(name) in batch else batch[name] for name in self.label_columns}
        return own | {name: batch[name] for name in map(positions_of, self.label_columns) if name in batch}

    @property
    def num_sums(self) -> int:
        """Length of what `pack` returns."""
        return len(self.terms) + 2 * len(self.metrics) + self.num_tallies

    def pack(self, result: HeadResult) -> Tensor:
        """Put a head's result into one tensor, so that it is reduced in one collective.

        Returns:
            fp32 (terms + 2 * metrics + num_tallies,): each term's sum, then each metric's sum and weight, and the
            counts, which carry no gradient.

        Raises:
            ValueError: the head returned other terms, metrics or counts than it declares.
        """
        for kind, declared, returned in (
            ("terms", self.terms, result.terms),
            ("metrics", self.metrics, result.metrics),
        ):
            if set(declared) != set(returned):
                raise ValueError(f"the head returned {kind} {sorted(returned)}, its HeadSpec has {sorted(declared)}")
        sums = [result.terms[name] for name in self.terms]
        averaged = [part.detach().float() for name in self.metrics for part in result.metrics[name]]
        packed = torch.stack([*sums, *averaged])
        tallies = packed.new_empty(0) if result.tallies is None else result.tallies.detach().float()
        if len(tallies) != self.num_tallies:
            raise ValueError(f"the head returned {len(tallies)} counts, its HeadSpec has {self.num_tallies}")
        return torch.cat([packed, tallies]) if self.num_tallies else packed

    def scaled_loss(self, packed: Tensor, scales: Sequence[float]) -> Tensor:
        """Return the scalar to differentiate: the sum of the terms' sums times their scales."""
        return reduce(operator.add, [term * scale for term, scale in zip(packed, scales)])


@dataclass(frozen=True)
class HeadResult:
    """Losses and metrics of one micro-batch, equal on all tensor ranks.

    Attributes:
        terms: name of a loss term -> fp32 scalar, the sum of its labels' losses.
        metrics: name of a metric -> (sum, weight), scalars. What is logged is the sum of the sums over the global batch
            divided by the sum of the weights.
        tallies: counts, (num_tallies,); None = none.
        kept: numbers of each sample, (B, num_kept); None = none.
    """

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tallies: Tensor | None = None
    kept: Tensor | None = None


@dataclass(frozen=True)
class LayerSpec:
    """Declaration of one layer, which is not built yet.

    Attributes:
        name: prefix of its parameters' names, such as "embedding" or "blocks.3".
        build: allocates the module, `forward(activations) -> activations`. The last layer is an `OutputHead`.
        hidden: the hidden states that it takes: name among the activations -> the column of ids whose positions they
            belong to.
        columns: the columns of the batch that it or a later layer takes, where the batch has them.
        head: the declaration of the last layer; None in all others.
        cost: forward work relative to other layers, for balancing a pipeline.
        is_block: one of the layers of which every pipeline stage gets at least one.
        tied: own parameter's name -> name in the model of the earlier layer's parameter that it shares.
    """

    name: str
    build: Callable[[], nn.Module]
    hidden: Mapping[str, str] = field(default_factory=lambda: {HIDDEN: "input_ids"})
    columns: tuple[str, ...] = ()
    head: HeadSpec | None = None
    cost: float = 0.0
    is_block: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)


def head_of(specs: Sequence[LayerSpec]) -> HeadSpec:
    """Return the declaration of a model's output head."""
    head = specs[-1].head
    assert head is not None, f"the last layer, {specs[-1].name}, declares no head"
    return head


ChangeLayers = Callable[[list[LayerSpec], BuildContext], list[LayerSpec]]
"""(a model's own layers, build context) -> the layers to train, such as with another head."""


def own_layers(layers: list[LayerSpec], ctx: BuildContext) -> list[LayerSpec]:
    """Return a model's own layers."""
    return layers


def with_head(specs: Sequence[LayerSpec], build: type[OutputHead], head: HeadSpec) -> list[LayerSpec]:
    """Return the same layers with another class of output head over the same parameters.

    Args:
        specs: a model's layers, as its family builds them.
        build: usually a subclass of the model's own head, whose arguments it is built with.
        head: what it declares.
    """
    last = specs[-1]
    assert isinstance(last.build, partial), f"{last.name} is not built by a partial: {last.build}"
    own = partial(build, *last.build.args, **last.build.keywords)
    return [*specs[:-1], replace(last, build=own, head=head)]


class OutputHead(nn.Module, ABC):
    """The last layer: turns hidden states into losses without leaving logits behind.

    Loss and head are one call, because DeepSpeed starts a backward pass (and clears bf16 gradients) when the gradient
    reaches what the module returned: a parameter used after that, in a loss function, would lose its gradient. It
    returns one tensor, because DeepSpeed hooks the tensors that a module returns (to scale gradients, and to gather
    ZeRO-3's parameters for the backward pass) and finds none inside other objects.

    Attributes:
        spec: its declaration, set when it becomes part of a model.
        kept: `HeadResult.kept` of each micro-batch in evaluation mode, until the engine takes them.
    """

    spec: HeadSpec

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, activations: Activations, labels: Mapping[str, Tensor] | None = None) -> Tensor | Activations:
        """Return `HeadSpec.pack` of losses and metrics; without labels the predictions by name, such as "logits"."""
        with profiled(HEAD):
            if labels is None:
                return self.outputs(activations)
            result = self.losses(activations, labels)
            if result.kept is not None and not self.training:
                self.kept.append(result.kept.detach().float())
            return self.spec.pack(result)

    @abstractmethod
    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> HeadResult:
        """Return the sums of losses, and of metrics, over one micro-batch, equal on all tensor ranks."""

    @abstractmethod
    def outputs(self, activations: Activations) -> Activations:
        """Return the predictions by name, (B, ...)."""


class SequentialModel(nn.Module):
    """All layers in one process, under the names that a pipeline gives them too."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        super().__init__()
        self.order: list[nn.Module] = []
        self.columns = specs[0].columns
        register_layers(self, specs, self._built(specs))

    def _built(self, specs: Sequence[LayerSpec]) -> Iterator[nn.Module]:
        """Build one layer at a time: what it shares with an earlier one is released before the next is built."""
        for spec in specs:
            self.order.append(spec.build())
            yield self.order[-1]

    def forward(self, batch: Mapping[str, Tensor], labels: Mapping[str, Tensor] | None = None) -> Tensor | Activations:
        """Run all layers on the batch's columns, each (B, ...); returns the result of `OutputHead.forward`."""
        activations = input_activations(batch, self.columns)
        for layer in self.order[:-1]:
            activations = layer(activations)
        return self.order[-1](activations, labels)


def input_activations(batch: Mapping[str, Tensor], columns: Iterable[str]) -> Activations:
    """Return what enters the first layer: those of the columns that the batch has, masks as bytes."""
    found = {name: batch[name] for name in columns if name in batch}
    return {name: column.to(torch.uint8) if column.dtype == torch.bool else column for name, column in found.items()}


def register_layers(parent: nn.Module, specs: Sequence[LayerSpec], layers: Iterable[nn.Module]) -> dict[str, str]:
    """Register layers under their names, share tied parameters where both layers are here, and give a head its
    declaration.

    Returns:
        name -> name in the model, for parameters that are tied to one of a layer that is not here. If several are tied
        to the same one, they are shared under the first one's name.
    """
    renamed: dict[str, str] = {}
    for spec, layer in zip(specs, layers):
        _register(parent, spec.name, layer)
        if isinstance(layer, OutputHead):
            layer.spec = head_of([spec])
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
