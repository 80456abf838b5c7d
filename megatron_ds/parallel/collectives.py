"""The conjugate pairs of collectives that make tensor and sequence parallelism differentiable.

`f` and `g` are those of Megatron-LM (Shoeybi et al. 2019, section 3); the sequence-parallel pair is that of
Korthikanti et al. 2022, section 4.2.2. Sequence is always dim 0. Every function is the identity on an axis of size 1.

Each states what one call puts on the wire per rank for a tensor of n bytes on t ranks (ring algorithms):
all-reduce 2n(t-1)/t; all-gather and reduce-scatter n(t-1)/t with n the size of the whole tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.parallel.grid import Axis


def all_reduce_(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over the axis. Not differentiable."""
    if axis.size > 1 and not (op == dist.ReduceOp.SUM and axis.sum_here(x)):
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def begin_all_reduce_(x: Tensor, axis: Axis) -> dist.Work | None:
    """Begin to sum in place over the axis; None = it is done, else to be waited for before x is read."""
    if axis.size == 1 or axis.sum_here(x):
        return None
    return dist.all_reduce(x, group=axis.group, async_op=True)


def all_gather_dim0(x: Tensor, axis: Axis) -> Tensor:
    """(S/t, ...) -> (S, ...). Not differentiable."""
    if axis.size == 1:
        return x
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    dist.all_gather_single(out, x.contiguous(), group=axis.group)
    return out


def reduce_scatter_dim0(x: Tensor, axis: Axis) -> Tensor:
    """(S, ...) -> (S/t, ...), summed over the axis. Not differentiable."""
    if axis.size == 1:
        return x
    assert x.shape[0] % axis.size == 0, (tuple(x.shape), axis.size)
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    dist.reduce_scatter_single(out, x.contiguous(), group=axis.group)
    return out


def sum_over_holders(x: Tensor, axis: Axis, shares: int) -> Tensor:
    """Sum a tensor over the ranks that hold the same share: `axis.size // shares` neighbours. Not differentiable.

    One all-reduce of `shares` times the tensor over the whole axis, so that it needs no process group of its own:
    what is shared this way, K and V of a few heads, is small.
    """
    if shares == axis.size:
        return x
    whole = x.new_zeros((shares, *x.shape))
    mine = axis.rank * shares // axis.size
    whole[mine] = x
    return all_reduce_(whole, axis)[mine]


class _CopyToHolders(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, shares: int) -> Tensor:
        ctx.axis, ctx.shares = axis, shares
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_over_holders(grads[0], ctx.axis, ctx.shares), None, None


def copy_to_holders(x: Tensor, axis: Axis, shares: int) -> Tensor:
    """A parameter's share that `axis.size // shares` ranks hold: forward identity, backward `sum_over_holders`."""
    return _CopyToHolders.apply(x, axis, shares) if shares < axis.size else x


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
    """The sum over the axis, used differently by each of its ranks. All-reduce forward and backward.

    For statistics over a dim that the axis divides. `reduce_from` is for sums that all ranks go on to use alike.
    """
    return _SumOver.apply(x, axis) if axis.size > 1 else x


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Megatron's f: forward identity, backward all-reduce.

    Also what a replicated *parameter* needs when the ranks of the axis see different activations (norms and
    row-parallel biases under sequence parallelism, q/k norms under tensor parallelism): its partial gradients are
    summed inside autograd, before ZeRO partitions them.
    """
    return _CopyTo.apply(x, axis) if axis.size > 1 else x


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Megatron's g: forward all-reduce, backward identity."""
    return _ReduceFrom.apply(x, axis) if axis.size > 1 else x


def reduce_from_(x: Tensor, axis: Axis) -> Tensor:
    """`reduce_from` in place of x, which nothing else reads: a product that was made for it."""
    return _ReduceFromInPlace.apply(x, axis) if axis.size > 1 else x


def gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """(S/t, B, H) -> (S, B, H). Forward all-gather, backward reduce-scatter (Korthikanti et al. 2022)."""
    return _GatherSequence.apply(x, axis) if axis.size > 1 else x


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """(S, B, H) partial sums -> (S/t, B, H). Forward reduce-scatter, backward all-gather (Korthikanti et al. 2022)."""
    return _ReduceScatterSequence.apply(x, axis) if axis.size > 1 else x
