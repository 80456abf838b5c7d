"""Megatron's tensor parallelism of a layer, with or without sequence parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megatron_ds.parallel.collectives import copy_to, copy_to_holders, reduce_from, reduce_scatter_sequence
from megatron_ds.parallel.grid import Axes, Axis


@dataclass(frozen=True)
class TensorParallel:
    """The tensor axis, with or without a split of the activations between parallel regions along the sequence.

    Attributes:
        axis: the tensor axis; size 1 means no communication at all.
        sequence: Megatron's sequence parallelism (Korthikanti et al. 2022). Outside the parallel regions hidden
            states are then (S/t, B, H) instead of (S, B, H). It has no effect on an axis of size 1.
        eager_products: a compiler leaves products out of its graphs, because the layers' own are faster.
    """

    axis: Axis = field(default_factory=Axis)
    sequence: bool = False
    eager_products: bool = False

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

    def sequence_slice(self, length: int) -> slice:
        """Return the positions of a sequence of `length` that this rank holds between the parallel regions."""
        if not self.splits_sequence:
            return slice(0, length)
        part = length // self.axis.size
        return slice(self.axis.rank * part, (self.axis.rank + 1) * part)
