"""SwiGLU and GeGLU (Shazeer 2020) of gate and up in one tensor, one pass forward and one backward.

Activation and product are fp32 inside and rounded once, so results are closer to the exact ones than those of PyTorch's
formula, which rounds twice. Only the input is saved. The backward pass writes the gradients of both halves into one
tensor, as the next matrix product reads it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.layers.kernels.triton.launch import as_rows

BLOCK, NUM_WARPS = 1024, 4  # 8 elements per thread: loads of 16 bytes in half precision


@triton.jit
def _activated(gate: tl.tensor, ACTIVATION: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the activation of fp32 values, x * share(x), and its derivative."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "gelu_tanh":  # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        square = gate * gate
        share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * gate * (1.0 + 0.044715 * square)))
        slope = share + gate * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        share = 1.0 / (1.0 + tl.exp(-gate))
        slope = share + gate * share * (1.0 - share)
    return gate * share, slope


@triton.jit
def _halves(
    wide: tl.tensor, row: tl.tensor, columns: tl.tensor, size: tl.tensor, stride: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Load some columns of a row's gate and up, in fp32."""
    gate = wide + row * stride + columns
    inside = columns < size
    return (
        tl.load(gate, inside, other=0.0).to(tl.float32),
        tl.load(gate + size, inside, other=0.0).to(tl.float32),
    )


@triton.jit
def _forward(
    wide: tl.tensor, y: tl.tensor, size: tl.tensor, stride: tl.tensor, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Write act(gate) * up for BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up = _halves(wide, row, columns, size, stride)
    value, _ = _activated(gate, ACTIVATION)
    tl.store(y + row * size + columns, (value * up).to(y.dtype.element_ty), columns < size)


@triton.jit
def _backward(
    wide: tl.tensor,
    grad_y: tl.tensor,
    grad_wide: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    grad_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the gradients of gate and up for BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate, up = _halves(wide, row, columns, size, stride)
    grad = tl.load(grad_y + row * grad_stride + columns, inside, other=0.0).to(tl.float32)
    value, slope = _activated(gate, ACTIVATION)
    kind = grad_wide.dtype.element_ty
    tl.store(grad_wide + row * 2 * size + columns, (grad * up * slope).to(kind), inside)
    tl.store(grad_wide + row * 2 * size + size + columns, (grad * value).to(kind), inside)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wide: Tensor, activation: str) -> Tensor:
        rows, size = as_rows(wide), wide.shape[-1] // 2
        y = torch.empty(*wide.shape[:-1], size, dtype=wide.dtype, device=wide.device)
        _forward[(len(rows), triton.cdiv(size, BLOCK))](
            rows, y, size, rows.stride(0), activation, BLOCK, num_warps=NUM_WARPS
        )
        ctx.save_for_backward(wide)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (wide,) = ctx.saved_tensors
        rows, given, size = as_rows(wide), as_rows(grads[0]), wide.shape[-1] // 2
        grad = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
        _backward[(len(rows), triton.cdiv(size, BLOCK))](
            *(rows, given, grad, size, rows.stride(0), given.stride(0), ctx.activation, BLOCK), num_warps=NUM_WARPS
        )
        return grad, None


def swiglu(wide: Tensor) -> Tensor:
    """Compute a `Gated`."""
    return _Gated.apply(wide, "silu")


def geglu(wide: Tensor, approximate: str) -> Tensor:
    """Compute a `GeGLU`."""
    return _Gated.apply(wide, "gelu_tanh" if approximate == "tanh" else "gelu")
