"""Column- and row-parallel linear layers (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.parameter import ParamSpec, make_parameter
from megatron_ds.parallel.collectives import all_gather_dim0
from megatron_ds.parallel.tensor import TensorParallel


class _ColumnLinear(torch.autograd.Function):
    """Enter the tensor-parallel region and multiply, overlapping the backward collective with the weight gradient.

    Saves the input as it comes, (S/t, B, H) under sequence parallelism, and gathers it again in the backward pass:
    a layer then moves 10 bsh(t-1)/t elements a micro-batch instead of 8, and keeps 1/t of the activation.
    The weight is saved as the leaf parameter, because ZeRO-3 swaps its data between forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        whole = all_gather_dim0(x, tp.axis) if tp.splits_sequence else x
        flat_bias = bias.flatten() if bias is not None else None
        return F.linear(whole, weight.flatten(0, -2), flat_bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        tp: TensorParallel = ctx.tp
        axis = tp.axis
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]

        whole, gathering = x, None
        if tp.splits_sequence and wants_weight:
            whole = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
            gathering = dist.all_gather_single(whole, x.contiguous(), group=axis.group, async_op=True)

        grad_x, reducing = None, None
        if wants_x:
            grad_x = grad @ weight.flatten(0, -2)
            if tp.splits_sequence:
                partial = grad_x
                grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
                reducing = dist.reduce_scatter_single(grad_x, partial.contiguous(), group=axis.group, async_op=True)
            elif axis.size > 1:
                reducing = dist.all_reduce(grad_x, group=axis.group, async_op=True)

        if gathering is not None:
            gathering.wait()
        rows = grad.flatten(0, -2)
        grad_weight = (rows.t() @ whole.flatten(0, -2)).view_as(weight) if wants_weight else None
        grad_bias = rows.sum(0).view(weight.shape[:-1]) if wants_bias and ctx.has_bias else None
        if reducing is not None:
            reducing.wait()
        return grad_x, grad_weight, grad_bias, None


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output features divided over the tensor axis.

    (S, B, H), or (S/t, B, H) under sequence parallelism -> (S, B, out/t). Forward: nothing, or an all-gather of the
    input. Backward: all-reduce of the input's gradient; or an all-gather of the input and a reduce-scatter.

    Args:
        in_features: H.
        out_shape: whole output shape, for example (F,) or (2, F) for fused gate and up; flattened in the result.
        tp: the tensor axis.
        std: standard deviation of the weight's initialisation.
        bias: whether there is a bias of `out_shape`.
        split_dim: which dim of `out_shape` is divided.
    """

    def __init__(
        self,
        in_features: int,
        out_shape: tuple[int, ...],
        tp: TensorParallel,
        *,
        std: float,
        bias: bool = False,
        split_dim: int = 0,
    ) -> None:
        super().__init__()
        assert out_shape[split_dim] % tp.axis.size == 0, (out_shape, split_dim, tp.axis.size)
        self.tp = tp
        self.weight = make_parameter(ParamSpec((*out_shape, in_features), split_dim, std=std), tp.axis)
        self.bias = make_parameter(ParamSpec(out_shape, split_dim, decay=False), tp.axis) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return _ColumnLinear.apply(x, self.weight, self.bias, self.tp)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the input features divided over the tensor axis; the bias is added once, after the reduction.

    (S, B, in/t) -> (S, B, H), or (S/t, B, H) under sequence parallelism. Forward: all-reduce or reduce-scatter of the
    output. Backward: nothing, or an all-gather of the output's gradient.
    """

    def __init__(
        self, in_features: int, out_features: int, tp: TensorParallel, *, std: float, bias: bool = False
    ) -> None:
        super().__init__()
        assert in_features % tp.axis.size == 0, (in_features, tp.axis.size)
        self.tp = tp
        self.weight = make_parameter(ParamSpec((out_features, in_features), 1, std=std), tp.axis)
        self.bias = make_parameter(ParamSpec((out_features,), decay=False), tp.axis) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.tp.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + self.tp.between(self.bias)
