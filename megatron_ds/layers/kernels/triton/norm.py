"""RMSNorm (Zhang and Sennrich 2019) in one pass forward and one backward, alone or after the residual sum.

A program holds whole rows in registers, so each element is read once. Statistics and products are fp32. The weight's
gradient is summed in fp32 by each program over its rows, then over programs, always in the same order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.layers.kernels.triton.launch import as_rows, num_programs, row_tile


@triton.jit
def _forward(
    x: tl.tensor,
    change: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    y: tl.tensor,
    inverse_rms: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    change_stride: tl.tensor,
    eps: tl.tensor,
    ADDS: tl.constexpr,
    FP32_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Normalise ROWS rows of x, or of x + change, which is written to `total` and rounded before it is normalised."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
    packed = rows[:, None] * size + columns[None, :]
    values = tl.load(x + rows[:, None] * x_stride + columns[None, :], inside, other=0.0)
    if ADDS:
        added = tl.load(change + rows[:, None] * change_stride + columns[None, :], inside, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
        tl.store(total + packed, values, inside)
    exact = values.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(exact * exact, 1) / size + eps)
    tl.store(inverse_rms + rows, scale, rows < num_rows)
    normal = exact * scale[:, None]
    if not FP32_WEIGHT:
        normal = normal.to(values.dtype).to(tl.float32)  # Llama casts down before the product
    factor = tl.load(weight + columns, columns < size, other=0.0).to(tl.float32) + OFFSET
    tl.store(y + packed, (normal * factor[None, :]).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    x: tl.tensor,
    weight: tl.tensor,
    inverse_rms: tl.tensor,
    grad_y: tl.tensor,
    grad_total: tl.tensor,
    grad_x: tl.tensor,
    grad_weight: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    x_stride: tl.tensor,
    grad_y_stride: tl.tensor,
    grad_total_stride: tl.tensor,
    ADDS: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    FP32_WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the gradient of the normalised rows, plus that of the sum, and this program's part of the weight's."""
    columns = tl.arange(0, BLOCK)
    summed = tl.zeros((ROWS, BLOCK), tl.float32)
    start = tl.program_id(0) * ROWS
    while start < num_rows:  # a range over a tensor fails in the interpreter of Triton 3.6
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
        values = tl.load(x + rows[:, None] * x_stride + columns[None, :], inside, other=0.0)
        scale = tl.load(inverse_rms + rows, rows < num_rows, other=0.0)[:, None]
        grad = tl.load(grad_y + rows[:, None] * grad_y_stride + columns[None, :], inside, other=0.0).to(tl.float32)
        normal = values.to(tl.float32) * scale
        if WANTS_WEIGHT:
            summed += grad * (normal if FP32_WEIGHT else normal.to(values.dtype).to(tl.float32))
        factor = tl.load(weight + columns, columns < size, other=0.0).to(tl.float32) + OFFSET  # registers are scarce
        grad = grad * factor[None, :]
        mean = tl.sum(grad * normal, 1) / size
        grad = (grad - normal * mean[:, None]) * scale
        if ADDS:
            other = tl.load(grad_total + rows[:, None] * grad_total_stride + columns[None, :], inside, other=0.0)
            grad += other.to(tl.float32)
        tl.store(grad_x + rows[:, None] * size + columns[None, :], grad.to(grad_x.dtype.element_ty), inside)
        start += tl.num_programs(0) * ROWS
    if WANTS_WEIGHT:
        tl.store(grad_weight + tl.program_id(0).to(tl.int64) * size + columns, tl.sum(summed, 0), columns < size)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, change: Tensor | None, weight: Tensor, eps: float, fp32_weight: bool, offset: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        rows, size = as_rows(x), x.shape[-1]
        tile = row_tile(size)
        dtype = x.dtype if fp32_weight else torch.promote_types(x.dtype, weight.dtype)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if change is not None else None
        inverse_rms = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        added = as_rows(change) if change is not None else rows
        _forward[(triton.cdiv(len(rows), tile.rows),)](
            *(rows, added, weight, total, y, inverse_rms, len(rows), size, rows.stride(0), added.stride(0), eps),
            *(total is not None, fp32_weight, offset, tile.rows, tile.block),
            num_warps=tile.num_warps,
        )
        ctx.save_for_backward(x if total is None else total, weight, inverse_rms)
        ctx.fp32_weight, ctx.offset = fp32_weight, offset
        ctx.set_materialize_grads(False)
        return y if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the same gradient for both terms of a sum."""
        x, weight, inverse_rms = ctx.saved_tensors
        adds = len(grads) == 2
        grad_y, grad_total = grads if adds else (grads[0], None)
        if grad_y is None:  # the sum was used, its norm was not
            return grad_total, grad_total, None, None, None, None
        rows, given = as_rows(x), as_rows(grad_y)
        other = as_rows(grad_total) if grad_total is not None else given
        size, tile, wants_weight = x.shape[-1], row_tile(x.shape[-1]), ctx.needs_input_grad[2]
        programs = min(num_programs(x.device, tile), triton.cdiv(len(rows), tile.rows))
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        partial = torch.empty(programs, size, dtype=torch.float32, device=x.device) if wants_weight else None
        _backward[(programs,)](
            *(rows, weight, inverse_rms, given, other, grad_x, partial, len(rows), size),
            *(rows.stride(0), given.stride(0), other.stride(0), grad_total is not None, wants_weight),
            *(ctx.fp32_weight, ctx.offset, tile.rows, tile.block),
            num_warps=tile.num_warps,
        )
        grad_weight = partial.sum(0).to(weight.dtype) if partial is not None else None
        return grad_x, grad_x if adds else None, grad_weight, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute an `RMSNorm`."""
    return _RMSNorm.apply(x, None, weight, eps, False, 0.0)


def add_rms_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute an `AddRMSNorm`."""
    return _RMSNorm.apply(x, change, weight, eps, False, 0.0)


def fp32_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Compute an `FP32RMSNorm`."""
    return _RMSNorm.apply(x, None, weight, eps, True, offset)
