"""Column- and row-parallel linear layers (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.adapter_layers import FrozenLayer
from megatron_ds.layers.param_spec import Matrices, ParamSpec, make_parameter, over_tensor
from megatron_ds.layers.products import (
    add_product_,
    gradient_sum,
    linear,
    linear_without_values,
    multiply,
    weight_gradient,
)
from megatron_ds.parallel.collectives import (
    all_gather_dim0,
    begin_all_gather_dim0,
    begin_all_reduce_,
    begin_reduce_scatter_dim0,
    reduce_from_,
    scatter_without_values,
    sum_over_holders,
)
from megatron_ds.parallel.tensor import TensorParallel


class _ColumnLinears(torch.autograd.Function):
    """Enter the tensor-parallel region once and multiply, overlapping the backward collectives with weight gradients.

    Under sequence parallelism it saves the local input, (S/t, B, H), and gathers it again in the backward pass: a layer
    then communicates 10 bsh(t-1)/t elements per micro-batch instead of 8, and keeps 1/t of the activation.
    Weights are saved as leaf parameters, because ZeRO-3 swaps their data between forward and backward. A weight's
    gradient is added to its `gradient_sum`, if it has one, unless ranks with the same shard add theirs first.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tp: TensorParallel, num_shards: tuple[int, ...], *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(num_shards)], parameters[len(num_shards) :]
        ctx.tp, ctx.num_shards, ctx.has_bias = tp, num_shards, [bias is not None for bias in biases]
        ctx.sums = [
            gradient_sum(weight) if shards == tp.axis.size else None for weight, shards in zip(weights, num_shards)
        ]
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3 : 3 + len(weights)]) else None, *weights)
        return _products(all_gather_dim0(x, tp.axis) if tp.splits_sequence else x, weights, biases)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        tp: TensorParallel = ctx.tp
        axis = tp.axis
        wants = ctx.needs_input_grad
        wants_x, wants_weight, wants_bias = wants[0], wants[3 : 3 + len(weights)], wants[3 + len(weights) :]

        full, gathering = x, None
        if tp.splits_sequence and any(wants_weight):
            full, gathering = begin_all_gather_dim0(x, axis)

        grad_x, reducing = None, None
        if wants_x:
            grad_x = multiply(grads[0], weights[0].flatten(0, -2))
            for grad, weight in zip(grads[1:], weights[1:]):
                add_product_(grad_x.flatten(0, -2), grad.flatten(0, -2), weight.flatten(0, -2))
            if tp.splits_sequence:
                grad_x, reducing = begin_reduce_scatter_dim0(grad_x, axis)
            else:
                reducing = begin_all_reduce_(grad_x, axis)

        if gathering is not None:
            gathering.wait()
        inputs = full.flatten(0, -2) if any(wants_weight) else None
        grad_weights, grad_biases = [], []
        for index, (grad, weight, num_shards) in enumerate(zip(grads, weights, ctx.num_shards)):
            rows = grad.flatten(0, -2)
            grad_weight = weight_gradient(rows, inputs, weight, ctx.sums[index]) if wants_weight[index] else None
            grad_bias = rows.sum(0).view(weight.shape[:-1]) if wants_bias[index] and ctx.has_bias[index] else None
            grad_weights.append(None if grad_weight is None else sum_over_holders(grad_weight, axis, num_shards))
            grad_biases.append(None if grad_bias is None else sum_over_holders(grad_bias, axis, num_shards))
        if reducing is not None:
            reducing.wait()
        return grad_x, None, None, *grad_weights, *grad_biases


def _products(x: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Multiply x, (..., in), by each weight, (..., in) with the outputs in its other dims, and add its bias if any."""
    return tuple(
        linear(x, weight.flatten(0, -2), bias.flatten() if bias is not None else None)
        for weight, bias in zip(weights, biases)
        if weight is not None
    )


def _column_linears(
    x: Tensor, tp: TensorParallel, num_shards: tuple[int, ...], *parameters: Tensor | None
) -> tuple[Tensor, ...]:
    """Multiply by the weights that come first among the parameters, and add the biases that follow them."""
    if not _joins_graph(tp, parameters[0]):
        return _eager_column_linears(x, tp, num_shards, *parameters)
    return _products(x, parameters[: len(num_shards)], parameters[len(num_shards) :])


def _row_linear(x: Tensor, tp: TensorParallel, weight: Tensor) -> Tensor:
    """Multiply and leave the tensor-parallel region."""
    return F.linear(x, weight) if _joins_graph(tp, weight) else _eager_row_linear(x, tp, weight)


def _joins_graph(tp: TensorParallel, weight: Tensor | None) -> bool:
    """Return whether a compiler is here, and may take a product and its backward pass into the graph of the block.

    Collectives are not compiled. Nor are products of weights that ZeRO-3 divides, which have a `ds_id`: a graph would
    keep the gathered weight until its backward pass. Nor are products where the compiler's are slower.
    """
    in_graph = tp.axis.size == 1 and not tp.eager_products and not hasattr(weight, "ds_id")
    return torch.compiler.is_compiling() and in_graph


@torch.compiler.disable
def _eager_column_linears(
    x: Tensor, tp: TensorParallel, num_shards: tuple[int, ...], *parameters: Tensor | None
) -> tuple[Tensor, ...]:
    """Apply `_ColumnLinears`."""
    return _ColumnLinears.apply(x, tp, num_shards, *parameters)


@torch.compiler.disable
def _eager_row_linear(x: Tensor, tp: TensorParallel, weight: Tensor) -> Tensor:
    """Multiply and leave the tensor-parallel region; an all-reduce works in place on the product.

    Product and reduction are autograd nodes of their own: torch's recomputation of a block stops once the last
    product's input is restored, and so repeats neither this product nor the reduction after it.
    """
    product = linear(x, weight, total=gradient_sum(weight))
    return tp.leave(product) if tp.splits_sequence else reduce_from_(product, tp.axis)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the output features divided over the tensor axis.

    (S, B, H), or (S/t, B, H) under sequence parallelism -> (S, B, out/t). Forward: nothing, or an all-gather of the
    input. Backward: all-reduce of the input's gradient; or an all-gather of the input and a reduce-scatter.

    Args:
        in_features: H.
        out_shape: full output shape, for example (F,) or (2, F) for fused gate and up; flattened in the result.
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
        spec = ParamSpec((*out_shape, in_features), over_tensor(split_dim), std=std, matrices=Matrices())
        self.weight = make_parameter(spec, tp.axes)
        self.bias = make_parameter(ParamSpec(out_shape, over_tensor(split_dim), decay=False), tp.axes) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        (y,) = _column_linears(x, self.tp, (self.tp.axis.size,), self.weight, self.bias)
        return y

    def frozen(self, names: Sequence[str]) -> FrozenLayer:
        """Return this layer for an adapter; `names` are of the projections along dim 0, or of the only one."""

        def rows(parameter: Tensor) -> Sequence[Tensor]:
            return parameter.unbind(0) if len(names) > 1 else (parameter,)

        def biases() -> dict[str, Tensor | None]:
            return dict(zip(names, rows(self.bias) if self.bias is not None else (None,) * len(names)))

        return FrozenLayer(
            tuple(self.parameters()),
            lambda: dict(zip(names, rows(self.weight))),
            biases,
            lambda x: dict(zip(names, self(x).chunk(len(names), dim=-1))),
        )


class QKVLinear(nn.Module):
    """Projections to queries, keys and values of one input, or to queries of one and keys and values of another.

    (S, B, H), or (S/t, B, H) under sequence parallelism -> queries (S, B, N/t * D), and keys and values, interleaved
    per head, (S, B, K/c * 2 * D) with c = gcd(K, t). Each input enters the tensor-parallel region once and communicates
    what it does in a `ColumnParallelLinear`. If t does not divide K, t/c neighbouring ranks hold the same key and value
    heads, whose gradients are summed over them: backward, an all-reduce of c shards.

    Args:
        in_features: H.
        num_heads, num_kv_heads, head_dim: N, K, D of the full model.
        tp: the tensor axis; t divides N.
        q_std, kv_std: standard deviations of the weights' initialisation.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        tp: TensorParallel,
        *,
        q_std: float,
        kv_std: float,
        bias: bool,
    ) -> None:
        super().__init__()
        assert num_heads % tp.axis.size == 0, (num_heads, tp.axis.size)
        q, kv = num_heads * head_dim, num_kv_heads * 2 * head_dim
        self.tp = tp
        keys_and_values = Matrices(alternating=2, block_rows=head_dim)
        kv_spec = ParamSpec((kv, in_features), over_tensor(0, num_kv_heads), std=kv_std, matrices=keys_and_values)
        q_spec = ParamSpec((q, in_features), over_tensor(0), std=q_std, matrices=Matrices())
        self.num_shards = (tp.axis.size, kv_spec.num_shards("tensor", tp.axis.size))  # of queries; of keys and values
        self.q_weight = make_parameter(q_spec, tp.axes)
        self.kv_weight = make_parameter(kv_spec, tp.axes)
        self.q_bias = make_parameter(ParamSpec((q,), over_tensor(0), decay=False), tp.axes) if bias else None
        kv_bias_spec = ParamSpec((kv,), over_tensor(0, num_kv_heads), decay=False, matrices=keys_and_values)
        self.kv_bias = make_parameter(kv_bias_spec, tp.axes) if bias else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Project queries from x, and keys and values from `context` (C, B, H), split like x; None = from x."""
        if context is None:
            parameters = (self.q_weight, self.kv_weight, self.q_bias, self.kv_bias)
            q, kv = _column_linears(x, self.tp, self.num_shards, *parameters)
            return q, kv
        q = self.queries(x)
        (kv,) = _column_linears(context, self.tp, self.num_shards[1:], self.kv_weight, self.kv_bias)
        return q, kv

    def queries(self, x: Tensor) -> Tensor:
        """Project queries from x alone."""
        (q,) = _column_linears(x, self.tp, self.num_shards[:1], self.q_weight, self.q_bias)
        return q

    def frozen(self, head_dim: int) -> FrozenLayer:
        """Return this layer for an adapter, with the projections q, k and v."""

        def apart(kv: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
            return tuple(one.flatten(dim, dim + 1) for one in kv.unflatten(dim, (-1, 2, head_dim)).unbind(dim + 1))

        def weights() -> dict[str, Tensor]:
            return dict(zip("qkv", (self.q_weight, *apart(self.kv_weight))))

        def biases() -> dict[str, Tensor | None]:
            if self.q_bias is None or self.kv_bias is None:
                return dict.fromkeys("qkv")
            return dict(zip("qkv", (self.q_bias, *apart(self.kv_bias))))

        def project(x: Tensor) -> dict[str, Tensor]:
            q, kv = self(x)
            return dict(zip("qkv", (q, *apart(kv, kv.dim() - 1))))

        return FrozenLayer(tuple(self.parameters()), weights, biases, project)


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
        spec = ParamSpec((out_features, in_features), over_tensor(1), std=std, matrices=Matrices())
        self.weight = make_parameter(spec, tp.axes)
        self.bias = make_parameter(ParamSpec((out_features,), decay=False), tp.axes) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = _row_linear(x, self.tp, self.weight)
        return y if self.bias is None else y + self.tp.between(self.bias)

    def without_values(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and the gradients of `forward(x)`, whose values mean nothing.

        Forward: nothing. Backward: that of `forward`.
        """
        y = linear_without_values(x, self.weight)
        if self.tp.splits_sequence:
            y = scatter_without_values(y, self.tp.axis)
        return y if self.bias is None else y + self.tp.between(self.bias)

    def frozen(self) -> FrozenLayer:
        """Return this layer for an adapter, with one projection without a name."""
        return FrozenLayer(
            tuple(self.parameters()), lambda: {"": self.weight}, lambda: {"": self.bias}, lambda x: {"": self(x)}
        )


class ReplicatedLinear(nn.Module):
    """y = x W^T + b with parameters that every tensor rank holds in full, because they are too small to divide.

    (S, B, in), or (S/t, B, in) under sequence parallelism -> (..., out). Used next to embeddings and in heads.

    Args:
        in_features, out_features: sizes.
        tp: the tensor axis.
        std: standard deviation of the weight's initialisation.
        bias: whether there is a bias.
        enter: how the parameters enter the graph: `tp.between` (the default) for hidden states; the identity for inputs
            that are equal on all tensor ranks, such as one vector per sequence.
        is_output: it is the last layer of a head.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: TensorParallel,
        *,
        std: float,
        bias: bool = False,
        enter: Callable[[Tensor], Tensor] | None = None,
        is_output: bool = False,
    ) -> None:
        super().__init__()
        self.enter = enter or tp.between
        matrices = None if is_output else Matrices()
        self.weight = make_parameter(ParamSpec((out_features, in_features), std=std, matrices=matrices), tp.axes)
        self.bias = make_parameter(ParamSpec((out_features,), decay=False), tp.axes) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.enter(self.weight), self.enter(self.bias) if self.bias is not None else None)
