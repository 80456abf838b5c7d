"""Tensor parallelism of a layer, with or without sequence parallelism, and the part of a sequence that a rank holds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ds.parallel.collectives import (
    all_gather_dim0,
    copy_to,
    copy_to_holders,
    reduce_from,
    reduce_scatter_sequence,
    sum_over,
)
from megatron_ds.parallel.context import ContextParallel, as_index, part_of_runs
from megatron_ds.parallel.grid import Axes, Axis


@dataclass(frozen=True)
class TensorParallel:
    """The tensor axis, with or without a split of the activations between parallel regions along the sequence.

    Attributes:
        axis: the tensor axis; size 1 means no communication at all.
        sequence: Megatron's sequence parallelism (Korthikanti et al. 2022). Outside the parallel regions hidden
            states are then (S/t, B, H) instead of (S, B, H). It has no effect on an axis of size 1.
        eager_products: a compiler leaves products out of its graphs, because the layers' own are faster.
        context: the ranks that divide each sequence before the tensor ranks do. Inside the parallel regions hidden
            states are then (S/c, B, H), and outside (S/c, B, H) or (S/(c t), B, H).
    """

    axis: Axis = field(default_factory=Axis)
    sequence: bool = False
    eager_products: bool = False
    context: ContextParallel = field(default_factory=ContextParallel)

    @property
    def axes(self) -> Axes:
        """The tensor axis by name, as `layers.param_spec` takes the axes."""
        return {"tensor": self.axis}

    @property
    def splits_sequence(self) -> bool:
        return self.sequence and self.axis.size > 1

    def between(self, parameter: Tensor) -> Tensor:
        """Enter a replicated parameter used *between* the parallel regions (norms, row-parallel biases, positions).

        Under sequence parallelism each rank sees its part of the sequence only, so the parameter's gradient is summed
        over the axis. Forward: nothing. Backward: all-reduce of the parameter's size.
        """
        return copy_to(parameter, self.axis) if self.splits_sequence else parameter

    def inside(self, parameter: Tensor) -> Tensor:
        """Enter a replicated parameter used *inside* a parallel region (q/k norms): each rank sees its own heads only.

        Forward: nothing. Backward: all-reduce of the parameter's size.
        """
        return copy_to(parameter, self.axis)

    def shared(self, parameter: Tensor, num_shards: int) -> Tensor:
        """Enter a shard of a parameter of which the axis holds `num_shards` different ones, inside a parallel region.

        If there are fewer shards than ranks (key and value heads), neighbours hold the same one and use it for
        different query heads: its gradient is summed over them. Forward: nothing. Backward: `sum_over_holders`.
        """
        return copy_to_holders(parameter, self.axis, num_shards)

    def leave(self, partial_sums: Tensor) -> Tensor:
        """Leave a parallel region: (S, B, H) partial sums -> (S, B, H), or (S/t, B, H) under sequence parallelism.

        Forward: all-reduce (g) or reduce-scatter. Backward: identity or all-gather.
        """
        if self.splits_sequence:
            return reduce_scatter_sequence(partial_sums, self.axis)
        return reduce_from(partial_sums, self.axis)

    @property
    def num_parts(self) -> int:
        """Number of parts that a sequence is divided into between the parallel regions."""
        return self.context.axis.size * (self.axis.size if self.splits_sequence else 1)

    @property
    def padded_to(self) -> int:
        """Divisor of the lengths that sequences are padded to; 1 without context ranks.

        Lengths that tensor ranks alone cannot divide are refused.
        """
        if self.context.axis.size == 1:
            return 1
        return self.context.multiple_of * (self.axis.size if self.splits_sequence else 1)

    def full_length(self, x: Tensor) -> int:
        """Return the length S of the sequence of which x (S/parts, ...) is this rank's part."""
        return x.shape[0] * self.num_parts

    def positions(self, length: int, device: torch.device) -> slice | Tensor:
        """Return the positions of a sequence of `length` that this rank holds between the parallel regions.

        They are an index of a dim of all positions: a slice, or a tensor on the device.
        """
        runs = self.context.runs(length)
        return as_index(part_of_runs(runs, self.axis.size, self.axis.rank) if self.splits_sequence else runs, device)

    def total(self, part: Tensor) -> Tensor:
        """Sum what the parts of a sequence add up to, such as a vector of a text: equal on all ranks.

        Tensor ranks all use it in the same way: forward all-reduce, backward nothing. Of context ranks one may use it:
        forward and backward all-reduce.
        """
        return sum_over(reduce_from(part, self.axis) if self.splits_sequence else part, self.context.axis)

    def gather(self, x: Tensor) -> Tensor:
        """Gather the parts of a sequence, for inspection: (S/parts, ...) -> (S, ...) in order. Not differentiable.

        An all-gather over tensor under sequence parallelism, and one over context.
        """
        return self.gather_context(all_gather_dim0(x, self.axis) if self.splits_sequence else x)

    def gather_context(self, x: Tensor) -> Tensor:
        """Gather the parts of context ranks: (S/c, ...) -> (S, ...) in order. All-gather; not differentiable."""
        context = self.context
        if context.axis.size == 1:
            return x
        everything = all_gather_dim0(x, context.axis)
        order = context.order(len(everything), x.device)
        return everything if order is None else torch.empty_like(everything).index_copy_(0, order, everything)

    def sequence_slice(self, length: int) -> slice:
        """Return which of a context rank's tokens, `length` of them, this rank holds between the parallel regions."""
        if not self.splits_sequence:
            return slice(0, length)
        part = length // self.axis.size
        return slice(self.axis.rank * part, (self.axis.rank + 1) * part)
