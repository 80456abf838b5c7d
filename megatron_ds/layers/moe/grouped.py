"""Products of consecutive groups of rows with a matrix each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.device_kind import GPU, device_kind
from megatron_ds.layers.products import add_product_, gradient_sum, multiply_into

_ALIGNMENT = 16  # bytes that the address and the rows of an operand of torch's grouped product are multiples of


class Groups:
    """The sizes of consecutive groups of rows, for all products of these rows.

    Args:
        counts: (G,) int64, the number of rows of each group, 0 included.
        sizes: the same numbers on the host. None = a product that needs them fetches them, once for all products; on a
            GPU the host waits for them.
    """

    def __init__(self, counts: Tensor, sizes: Sequence[int] | None = None) -> None:
        self.counts, self._sizes = counts, sizes

    @cached_property
    def sizes(self) -> list[int]:
        """The number of rows of each group, on the host."""
        return list(self._sizes) if self._sizes is not None else self.counts.tolist()

    @cached_property
    def ends(self) -> Tensor:
        """The index of the row after each group, (G,) int32, as torch's grouped product takes the groups."""
        return self.counts.cumsum(0, dtype=torch.int32)


class _GroupedLinear(torch.autograd.Function):
    """y = x W_g^T + b_g for the rows of each group g.

    Every rank computes a gradient of the weight, of zeros where a group has no row, because data ranks reduce it.
    The weight is saved as a leaf parameter, because ZeRO-3 swaps its data between forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.groups, ctx.has_bias, ctx.total = groups, bias is not None, gradient_sum(weight)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight)
        y = _grouped(x, groups, weight.flatten(1, -2).transpose(1, 2))
        return y if bias is None else y.add_(_per_row(bias.flatten(1), groups.counts, len(x)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        groups, (x, weight) = ctx.groups, ctx.saved_tensors
        rows, matrices = grads[0].contiguous(), weight.flatten(1, -2)
        grad_x = _grouped(rows, groups, matrices) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_weight = _weight_gradients(rows, x, groups, weight, ctx.total)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            grad_bias = _sums(rows, groups).view(weight.shape[:-1])
        return grad_x, None, grad_weight, grad_bias


def grouped_linear(x: Tensor, groups: Groups, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply the rows of each group by its matrix, and add its bias if there is one.

    Args:
        x: (rows, in), groups one after the other.
        groups: the groups, which several products can share.
        weight: (G, ..., in), with the outputs of a group in the dims between.
        bias: (G, ...).

    Returns:
        (rows, out).
    """
    return _GroupedLinear.apply(x, groups, weight, bias)


def _grouped(x: Tensor, groups: Groups, matrices: Tensor) -> Tensor:
    """Return x M_g for the rows of each group: (rows, in), (G, in, out) -> (rows, out)."""
    if _has_grouped_product(x, matrices):
        return F.grouped_mm(x, matrices, offs=groups.ends)
    y = x.new_empty((len(x), matrices.shape[-1]))
    for rows, given, matrix in zip(y.split(groups.sizes), x.split(groups.sizes), matrices.unbind(0)):
        if len(rows):
            multiply_into(rows, given, matrix)
    return y


def _weight_gradients(rows: Tensor, x: Tensor, groups: Groups, weight: Tensor, total: Tensor | None) -> Tensor | None:
    """Return the gradient of all matrices from those of the outputs (rows, out) and the inputs (rows, in); or add it.

    None = it is added to `total`. torch's grouped product rounds it to bf16 first, as autograd would. A product for
    each group would add in fp32, but the host would have to wait for the numbers of rows.
    """
    if _has_grouped_product(rows, x):
        gradient = F.grouped_mm(rows.t(), x, offs=groups.ends).view_as(weight)
        if total is None:
            return gradient
        total.add_(gradient)
        return None
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format) if total is None else total
    parts = zip(gradient.flatten(1, -2).unbind(0), rows.split(groups.sizes), x.split(groups.sizes))
    for one, grad, given in parts:
        if total is not None and len(given):
            add_product_(one, grad.t(), given)
        elif total is None and len(given):
            multiply_into(one, grad.t(), given)
        elif total is None:
            one.zero_()
    return gradient if total is None else None


def _sums(rows: Tensor, groups: Groups) -> Tensor:
    """Return the sum of the rows of each group: (rows, n) -> (G, n). As a product it needs no counts on the host."""
    if _has_grouped_product(rows, rows):
        ones = rows.new_ones((len(rows), _ALIGNMENT // rows.itemsize))
        return F.grouped_mm(ones.t(), rows, offs=groups.ends)[:, 0]
    return torch.stack([part.sum(0) for part in rows.split(groups.sizes)])


def _per_row(values: Tensor, counts: Tensor, num_rows: int) -> Tensor:
    """Return the value of each row's group: (G, n) -> (rows, n)."""
    return values.repeat_interleave(counts, 0, output_size=num_rows)


def _has_grouped_product(left: Tensor, right: Tensor) -> bool:
    """Return whether torch has one product for all groups, for these operands on their device.

    The number of rows decides nothing: of each operand, as of its transpose, the widths alone are strides. Groups of
    any size are right in all three products, because none of them divides a contiguous dim of an operand: then torch
    asserts on the device that sizes are multiples of 16 bytes, and not 0.
    """
    if device_kind(left.device) != GPU or left.dtype != torch.bfloat16 or not _is_one_kernel(left.device):
        return False
    places = (n for one in (left, right) for n in (one.shape[-1], one.storage_offset()))
    return all(place * left.itemsize % _ALIGNMENT == 0 for place in places)


@cache
def _is_one_kernel(device: torch.device) -> bool:
    """Return whether torch's grouped product is one kernel on a GPU: on those of compute capability 9 and 10.

    On others torch computes a product for each group, as we do, but fetches the sizes every time.
    """
    if not hasattr(F, "grouped_mm"):
        return False
    no_device = device.type == "meta" or not torch.cuda.is_available()  # the tensors have no memory
    return no_device or torch.cuda.get_device_capability(device)[0] in (9, 10)
