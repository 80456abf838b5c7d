"""Products of consecutive groups of rows with a matrix each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.products import add_product_, gradient_sum, multiply_into

_ALIGNMENT = 16  # bytes that rows of operands of torch's grouped product are multiples of


class _GroupedLinear(torch.autograd.Function):
    """y = x W_g^T + b_g for the rows of each group g.

    Every rank computes a gradient of the weight, of zeros where a group has no row, because data ranks reduce it.
    The weight is saved as a leaf parameter, because ZeRO-3 swaps its data between forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.has_bias, ctx.total = bias is not None, gradient_sum(weight)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, counts, weight)
        y = _grouped(x, counts, weight.flatten(1, -2).transpose(1, 2))
        return y if bias is None else y.add_(_per_row(bias.flatten(1), counts, len(x)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, counts, weight = ctx.saved_tensors
        rows, matrices = grads[0].contiguous(), weight.flatten(1, -2)
        grad_x = _grouped(rows, counts, matrices) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_weight = _weight_gradients(rows, x, counts, weight, ctx.total)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            grad_bias = _sums(rows, counts).view(weight.shape[:-1])
        return grad_x, None, grad_weight, grad_bias


def grouped_linear(x: Tensor, counts: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the rows of each group by its matrix, and add its bias if there is one.

    Args:
        x: (rows, in), groups one after the other.
        counts: (G,) int64, the number of rows of each group, 0 included.
        weight: (G, ..., in), with the outputs of a group in the dims between.
        bias: (G, ...).

    Returns:
        (rows, out).
    """
    return _GroupedLinear.apply(x, counts, weight, bias)


def _grouped(x: Tensor, counts: Tensor, matrices: Tensor) -> Tensor:
    """Return x M_g for the rows of each group: (rows, in), (G, in, out) -> (rows, out)."""
    if _has_grouped_product(x, matrices):
        return F.grouped_mm(x, matrices, offs=_ends(counts))
    y = x.new_empty((len(x), matrices.shape[-1]))
    sizes = counts.tolist()
    for rows, given, matrix in zip(y.split(sizes), x.split(sizes), matrices.unbind(0)):
        if len(rows):
            multiply_into(rows, given, matrix)
    return y


def _weight_gradients(rows: Tensor, x: Tensor, counts: Tensor, weight: Tensor, total: Tensor | None) -> Tensor | None:
    """Return the gradient of all matrices from those of the outputs (rows, out) and the inputs (rows, in); or add it.

    None = it is added to `total`.
    """
    if total is None and _has_grouped_product(rows, x):
        return F.grouped_mm(rows.t(), x, offs=_ends(counts)).view_as(weight)
    gradient = torch.zeros_like(weight, memory_format=torch.contiguous_format) if total is None else total
    sizes = counts.tolist()
    for one, grad, given in zip(gradient.flatten(1, -2).unbind(0), rows.split(sizes), x.split(sizes)):
        if len(given):
            if total is None:
                multiply_into(one, grad.t(), given)
            else:
                add_product_(one, grad.t(), given)
    return gradient if total is None else None


def _sums(rows: Tensor, counts: Tensor) -> Tensor:
    """Return the sum of the rows of each group: (rows, n) -> (G, n). As a product it needs no counts on the host."""
    if _has_grouped_product(rows, rows):
        ones = rows.new_ones((len(rows), _ALIGNMENT // rows.itemsize))
        return F.grouped_mm(ones.t(), rows, offs=_ends(counts))[:, 0]
    return torch.stack([part.sum(0) for part in rows.split(counts.tolist())])


def _ends(counts: Tensor) -> Tensor:
    """Return the index of the row after each group, int32, as torch's grouped product takes the groups."""
    return counts.cumsum(0, dtype=torch.int32)


def _per_row(values: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """Return the value of each row's group: (G, n) -> (rows, n)."""
    return values.repeat_interleave(counts, 0, output_size=num_rows)


def _has_grouped_product(left: Tensor, right: Tensor) -> bool:
    """Return whether torch has one product for all groups, for these operands on their device.

    The number of rows decides nothing: of each operand, as of its transpose, the widths alone are strides.
    """
    if left.device.type != "cuda" or left.dtype != torch.bfloat16:
        return False
    widths = (left.shape[-1], right.shape[-1])
    return hasattr(F, "grouped_mm") and all(width * left.itemsize % _ALIGNMENT == 0 for width in widths)
