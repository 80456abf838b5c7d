"""Conjugate pairs of collectives that make tensor and sequence parallelism differentiable.

`f` and `g` are those of Megatron-LM (Shoeybi et al. 2019, section 3); the sequence-parallel pair is that of
Korthikanti et al. 2022, section 4.2.2. Sequence is always dim 0. Every function is the identity on an axis of size 1.

Bytes that one call sends per rank, for a tensor of n bytes on t ranks (ring algorithms): all-reduce 2n(t-1)/t;
all-gather and reduce-scatter n(t-1)/t, with n the size of the full tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.parallel import messages
from megatron_ds.parallel.grid import Axis


def all_reduce_(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over the axis. Not differentiable."""
    if axis.size > 1 and not (op == dist.ReduceOp.SUM and axis.sum_here(x)):
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def begin_all_reduce_(x: Tensor, axis: Axis) -> dist.Work | None:
    """Start a sum in place over the axis. Wait for the returned work before reading x; None = it is already done."""
    if axis.size == 1 or axis.sum_here(x):
        return None
    return dist.all_reduce(x, group=axis.group, async_op=True)


class Pending(Protocol):
    """Communication under way."""

    def wait(self) -> object: ...


def _collective(name: str, earlier_name: str) -> Callable[..., Any]:
    """Return a function of torch.distributed by its name since torch 2.13, or by the one that it had before."""
    return getattr(dist, name, None) or getattr(dist, earlier_name)


def _all_gather(x: Tensor, axis: Axis, async_op: bool) -> tuple[Tensor, Pending | None]:
    if axis.neighbours is not None:
        return axis.neighbours.gather(x), None
    if x.device.type == "cpu":
        return messages.begin_gather(x, axis)
    gather = _collective("all_gather_single", "all_gather_into_tensor")
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    return out, gather(out, x.contiguous(), group=axis.group, async_op=async_op)


def _reduce_scatter(x: Tensor, axis: Axis, async_op: bool) -> tuple[Tensor, Pending | None]:
    assert x.shape[0] % axis.size == 0, (tuple(x.shape), axis.size)
    if axis.neighbours is not None:
        return axis.neighbours.reduce_scatter(x), None
    if x.device.type == "cpu":
        return messages.begin_reduce_scatter(x, axis)
    scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return out, scatter(out, x.contiguous(), group=axis.group, async_op=async_op)


def _done(out: Tensor, pending: Pending | None) -> Tensor:
    if pending is not None:
        pending.wait()
    return out


def all_gather_dim0(x: Tensor, axis: Axis) -> Tensor:
    """Gather along dim 0: (S/t, ...) -> (S, ...). Not differentiable."""
    return _done(*_all_gather(x, axis, async_op=False)) if axis.size > 1 else x


def begin_all_gather_dim0(x: Tensor, axis: Axis) -> tuple[Tensor, Pending | None]:
    """Start `all_gather_dim0`. Wait for the returned work before reading the tensor; None = it is already done."""
    return _all_gather(x, axis, async_op=True) if axis.size > 1 else (x, None)


def reduce_scatter_dim0(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis and scatter along dim 0: (S, ...) -> (S/t, ...). Not differentiable."""
    return _done(*_reduce_scatter(x, axis, async_op=False)) if axis.size > 1 else x


def begin_reduce_scatter_dim0(x: Tensor, axis: Axis) -> tuple[Tensor, Pending | None]:
    """Start `reduce_scatter_dim0`. Wait for the returned work before reading the tensor; None = it is already done."""
    return _reduce_scatter(x, axis, async_op=True) if axis.size > 1 else (x, None)


def sum_over_holders(x: Tensor, axis: Axis, num_shards: int) -> Tensor:
    """Sum a tensor over the `axis.size // num_shards` neighbours that hold the same shard. Not differentiable.

    One all-reduce of `num_shards` times the tensor's size over the complete axis, so that no further process group is
    needed: the parameters that are shared this way, K and V of a few heads, are small.
    """
    if num_shards == axis.size:
        return x
    by_shard = x.new_zeros((num_shards, *x.shape))
    own_shard = axis.rank * num_shards // axis.size
    by_shard[own_shard] = x
    return all_reduce_(by_shard, axis)[own_shard]


class _CopyToHolders(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, num_shards: int) -> Tensor:
        ctx.axis, ctx.num_shards = axis, num_shards
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_over_holders(grads[0], ctx.axis, ctx.num_shards), None, None


def copy_to_holders(x: Tensor, axis: Axis, num_shards: int) -> Tensor:
    """Enter a shard that `axis.size // num_shards` ranks hold: forward identity, backward `sum_over_holders`."""
    return _CopyToHolders.apply(x, axis, num_shards) if num_shards < axis.size else x


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_(grads[0].clone(memory_format=torch.contiguous_format), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ReduceFromInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.mark_dirty(x)
        return all_reduce_(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather_dim0(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_dim0(grads[0], ctx.axis), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter_dim0(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_dim0(grads[0], ctx.axis), None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce_(grads[0].clone(memory_format=torch.contiguous_format), ctx.axis), None


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis, for a sum that each rank uses differently. Forward and backward: all-reduce.

    It serves statistics over a dim that the axis divides; `reduce_from` is for sums that all ranks use in the same way.
    """
    return _SumOver.apply(x, axis) if axis.size > 1 else x


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Apply Megatron's f: forward identity, backward all-reduce.

    A replicated *parameter* needs it too when the ranks of the axis see different activations (norms and row-parallel
    biases under sequence parallelism, q/k norms under tensor parallelism): its partial gradients are summed inside
    autograd, before ZeRO partitions them.
    """
    return _CopyTo.apply(x, axis) if axis.size > 1 else x


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Apply Megatron's g: forward all-reduce, backward identity."""
    return _ReduceFrom.apply(x, axis) if axis.size > 1 else x


def reduce_from_(x: Tensor, axis: Axis) -> Tensor:
    """Apply `reduce_from` in place on x, which nothing else may read, such as a product computed for this call."""
    return _ReduceFromInPlace.apply(x, axis) if axis.size > 1 else x


def gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Gather: (S/t, B, H) -> (S, B, H). Forward all-gather, backward reduce-scatter (Korthikanti et al. 2022)."""
    return _GatherSequence.apply(x, axis) if axis.size > 1 else x


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Sum and scatter: (S, B, H) partial sums -> (S/t, B, H). Forward reduce-scatter, backward all-gather.

    Korthikanti et al. 2022.
    """
    return _ReduceScatterSequence.apply(x, axis) if axis.size > 1 else x


class _OnlyGathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.new_empty(()).expand(x.shape[0] // axis.size, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_dim0(grads[0], ctx.axis), None


def scatter_without_values(x: Tensor, axis: Axis) -> Tensor:
    """Return a tensor of the shape and the gradient of `reduce_scatter_sequence(x)`, whose values mean nothing.

    Forward nothing, backward all-gather.
    """
    return _OnlyGathered.apply(x, axis) if axis.size > 1 else x


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.count = axis, len(x)
        return x[rows_of(axis, len(x))].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather_rows(grads[0], ctx.axis, ctx.count), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, count: int) -> Tensor:
        ctx.axis, ctx.count = axis, count
        return _gather_rows(x, axis, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][rows_of(ctx.axis, ctx.count)], None, None


def rows_of(axis: Axis, count: int) -> slice:
    """Return which of `count` rows a rank of the axis has: as many as the others, but for the last ranks."""
    part = -(-count // axis.size)
    return slice(min(axis.rank * part, count), min((axis.rank + 1) * part, count))


def _gather_rows(x: Tensor, axis: Axis, count: int) -> Tensor:
    padded = x.new_zeros((-(-count // axis.size), *x.shape[1:]))
    padded[: len(x)] = x
    return all_gather_dim0(padded, axis)[:count]


def split_rows(x: Tensor, axis: Axis) -> Tensor:
    """Take this rank's part of rows that all ranks have, (T, ...) -> (T', ...); T need not be divisible.

    Forward nothing, backward all-gather. The counterpart is `gather_rows`.
    """
    return _SplitRows.apply(x, axis) if axis.size > 1 else x


def gather_rows(x: Tensor, axis: Axis, count: int) -> Tensor:
    """Gather the parts of `split_rows`, (T', ...) -> (T, ...), for all ranks to use in the same way.

    Forward all-gather, backward nothing.
    """
    return _GatherRows.apply(x, axis, count) if axis.size > 1 else x


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return _exchange_rows(x, axis, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange_rows(grads[0], ctx.axis, ctx.received, ctx.sent), None, None, None


def _exchange_rows(x: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=axis.group)
    return out


def exchange_rows(x: Tensor, axis: Axis, sent: list[int], received: list[int]) -> Tensor:
    """Send consecutive rows to the ranks of the axis, (sum(sent), ...) -> (sum(received), ...) by source.

    Forward and backward: an all-to-all, of the rows that are for other ranks.

    Args:
        x: rows, by the rank that gets them.
        axis: the ranks.
        sent, received: number of rows to and from each rank.
    """
    return _ExchangeRows.apply(x, axis, sent, received) if axis.size > 1 else x


def exchange_counts(counts: Tensor, axis: Axis) -> Tensor:
    """Send row r of (ranks, n) to rank r; returns (ranks, n), a row from each rank. Not differentiable."""
    if axis.size == 1:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=axis.group)
    return received
