"""Matrix products of linear layers and of the output head, and of their gradients.

On a CPU, oneDNN computes those in fp32 where it is faster (`onednn.py`).

A GPU's tensor cores add in fp32 whatever the operands are. Products of half-precision operands with an fp32 result keep
that sum instead of rounding it, and add to one in the product itself: torch's own `+= left @ right` writes a rounded
product, then reads, adds and writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers import onednn

TILE_ELEMENTS = 2**19
"""Elements of oneDNN's result that are written or added to another tensor at a time, while they are in the cache."""


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right, (..., K) and (K, N) -> (..., N)."""
    if onednn.computes(left, right):
        return onednn.multiply(left, right)
    return left @ right if _is_one_product(left) else _unfolded(left.flatten(0, -2) @ right, left)


def _is_one_product(left: Tensor) -> bool:
    """Return whether torch multiplies all rows of `left`, (..., K), at once; it folds them if that needs no copy.

    Else it multiplies the rows of each index of the first dim by themselves. On an H200 the products of 4,096 pairs of
    rows took 30 times as long as one of 8,192 rows. Compiled code has the choice of its compiler.
    """
    inner = zip(left.shape[:-2], left.stride()[:-2], left.shape[1:-1], left.stride()[1:-1])
    return torch.compiler.is_compiling() or all(
        stride == below * below_stride for size, stride, below, below_stride in inner if size > 1 and below > 1
    )


def _unfolded(product: Tensor, left: Tensor) -> Tensor:
    """Return a product (tokens, N) in the shape of its rows in `left`; not a view, where a reduction may not work."""
    return torch.ops.aten._unsafe_view.default(product, [*left.shape[:-1], product.shape[-1]])


def multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute out = left @ right. `out` has the operands' dtype, or is fp32."""
    if onednn.computes(left, right):
        for part, rows, columns in _tiles(out, left, right):
            part.copy_(onednn.multiply(rows, columns))
    elif out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.device.type == "cpu":  # torch has no such product there; those of fp32 copies are the same numbers
        multiply_into(out, left.float(), right.float())
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right. `total` has the operands' dtype, or is fp32."""
    if onednn.computes(left, right):
        for part, rows, columns in _tiles(total, left, right):
            part.add_(onednn.multiply(rows, columns))
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cpu":
        add_product_(total, left.float(), right.float())
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _tiles(out: Tensor, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield parts of the result along its longer dim, each with the rows and the columns that it is the product of."""
    num_rows, num_columns = out.shape
    length = max(onednn.NARROWEST, TILE_ELEMENTS // min(num_rows, num_columns))
    for begin in range(0, max(num_rows, num_columns), length):
        tile = slice(begin, begin + length)
        yield (out[tile], left[tile], right) if num_rows > num_columns else (out[:, tile], left, right[:, tile])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, total: Tensor | None = None) -> Tensor:
    """Return x W^T + b, (..., in) and (out, in) -> (..., out).

    Args:
        x, weight, bias: the operands. The weight is saved as it is given, because ZeRO-3 swaps the data of a leaf.
        total: fp32, of the weight's shape; the backward pass adds the weight's gradient to it. None = autograd gets it.
    """
    if total is None and _is_one_product(x) and not onednn.computes(x, weight.t()):
        return F.linear(x, weight, bias)
    detached = x.detach(), weight.detach(), bias.detach() if bias is not None else None
    if not torch.is_grad_enabled():
        return _linear(*detached)
    return _Product.apply(_Operands.apply(x, weight, bias, total), *detached)


def linear_without_values(x: Tensor, weight: Tensor) -> Tensor:
    """Return a tensor of the shape and the gradients of `linear(x, weight)`, whose values mean nothing.

    The weight's gradient is added to its `gradient_sum`, if it has one.
    """
    return _Operands.apply(x, weight, None, gradient_sum(weight))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b without a graph."""
    if not onednn.computes(x, weight.t()):
        if _is_one_product(x):
            return F.linear(x, weight, bias)
        return _unfolded(F.linear(x.flatten(0, -2), weight, bias), x)
    product = onednn.multiply(x, weight.t())
    return product if bias is None else product.add_(bias)


class _Operands(torch.autograd.Function):
    """Save the operands of x W^T + b, and compute their gradients; the result has its shape, and no memory.

    It is a node apart from the product, as torch's own saves its operands before it multiplies: a recomputation that
    stops when the last of them is restored then leaves out the product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: Tensor | None) -> Tensor:
        ctx.total = total
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return x.new_empty(()).expand(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = grads[0].flatten(0, -2)
        grad_x = multiply(grads[0], weight) if wants_x else None
        grad_weight = weight_gradient(rows, x.flatten(0, -2), weight, ctx.total) if wants_weight else None
        return grad_x, grad_weight, rows.sum(0) if wants_bias else None, None


class _Product(torch.autograd.Function):
    """Compute x W^T + b, which has the gradients of the `_Operands`."""

    @staticmethod
    def forward(ctx: Any, operands: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None


def weight_gradient(rows: Tensor, inputs: Tensor | None, weight: Tensor, total: Tensor | None) -> Tensor | None:
    """Return the weight's gradient from those of the outputs (tokens, out) and the inputs (tokens, in); or add it.

    None = it is added to `total`.
    """
    assert inputs is not None
    if total is None:
        return multiply(rows.t(), inputs).view_as(weight)
    add_product_(total.flatten(0, -2), rows.t(), inputs)
    return None


def keep_gradient_sum(parameter: Tensor, total: Tensor) -> None:
    """Have the backward passes of products add a parameter's gradient to a tensor, instead of returning it to autograd.

    Args:
        parameter: the weight of a linear layer or of the output head.
        total: fp32, of its shape; the engine reads it and sets it to zero.
    """
    assert total.shape == parameter.shape and total.dtype == torch.float32, (total.shape, total.dtype)
    parameter.gradient_sum = total  # type: ignore[attr-defined]


def release_gradient_sum(parameter: Tensor) -> None:
    """Have autograd get a parameter's gradient again."""
    del parameter.gradient_sum  # type: ignore[attr-defined]


def gradient_sum(parameter: Tensor | None) -> Tensor | None:
    """Return the tensor that a parameter's gradient is added to; None = autograd gets the gradient."""
    return getattr(parameter, "gradient_sum", None)
