"""Parameters in full on one rank, from the shards of the ranks that divide them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.layers.param_spec import AxisSplit, ParamSpec
from megatron_ds.parallel.collectives import exchange_rows
from megatron_ds.parallel.grid import EXPERT, Axes, Axis


def gather_shard(shard: Tensor, spec: ParamSpec, axes: Axes, to: Mapping[str, int] | None = None) -> Tensor | None:
    """Gather the shards of a parameter on one rank, without padding. Collective over `axes`, one after the other.

    If several ranks hold the same shard, the first one's is used.

    Args:
        shard: this rank's shard, padding included.
        spec: the parameter's declaration.
        axes: the axes over which the parameter is divided or copied.
        to: coordinates of the rank that receives it; 0 on an axis that is not given.

    Returns:
        The full tensor on that rank, None on the others.
    """
    axes = spec.axes_among(axes)
    target = {name: to.get(name, 0) if to is not None else 0 for name in axes}
    if any(axis.rank != target[name] for name, axis in axes.items() if spec.split_over(name) is None):
        return None
    gathered: Tensor | None = shard
    for split in spec.splits:
        if gathered is not None:
            gathered = _gather_dim(gathered, split, spec.shape[split.dim], axes[split.axis], target[split.axis])
    return gathered


def gather_part(
    shard: Tensor, spec: ParamSpec, axes: Axes, expert: int | None, to: Mapping[str, int] | None = None
) -> Tensor | None:
    """Gather one expert of a parameter on one rank, without the dim of the experts. Collective over expert.

    Args:
        shard, spec, axes, to: see `gather_shard`.
        expert: index of the expert; None = the full parameter, as `gather_shard` does.

    Returns:
        That part on that rank, which may be a view of the shard, None on the others.
    """
    if expert is None:
        return gather_shard(shard, spec, axes, to)
    axis, target = axes[EXPERT], to.get(EXPERT, 0) if to is not None else 0
    owner, index = divmod(expert, len(shard))
    if owner == target:
        return shard[index] if axis.rank == target else None
    own = shard[index : index + 1] if axis.rank == owner else shard[:0]
    sent, received = [0] * axis.size, [0] * axis.size
    sent[target], received[owner] = len(own), int(axis.rank == target)
    found = exchange_rows(own, axis, sent, received)
    return found[0] if axis.rank == target else None


def _gather_dim(shard: Tensor, split: AxisSplit, length: int, axis: Axis, to: int) -> Tensor | None:
    if axis.size == 1:
        return shard
    gathered = shard.new_empty((axis.size, *shard.shape)) if axis.rank == to else None
    received = list(gathered.unbind()) if gathered is not None else None
    dist.gather(shard.contiguous(), received, dst=axis.ranks[to], group=axis.group)
    if gathered is None:
        return None
    different = gathered[:: axis.size // split.num_shards(axis.size)]
    full = different.movedim(0, split.dim).flatten(split.dim, split.dim + 1)  # a view if it is the first dim
    return full.narrow(split.dim, 0, length)


def send_to_rank_0(
    full: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, source: int, rank: int, device: torch.device
) -> Tensor | None:
    """Send a tensor from one rank to global rank 0; returns it there, None elsewhere. The other ranks do nothing.

    Args:
        full: the tensor on `source`, which is not rank 0.
        shape, dtype: of it.
        source, rank: the rank that has it, and this one.
        device: of the result.
    """
    if rank == source:
        assert full is not None
        dist.send(full.contiguous(), dst=0)
    elif rank == 0:
        full = torch.empty(shape, dtype=dtype, device=device)
        dist.recv(full, src=source)
        return full
    return None
