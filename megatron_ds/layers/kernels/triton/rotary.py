"""Rotary position embedding (Su et al. 2021) of queries and keys in one launch, in place forward.

The backward pass writes new tensors: it moves as many bytes as in place, and a gradient may have other readers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.layers.kernels.reference import RotaryCall

PAIRS_PER_PROGRAM, NUM_WARPS = 1024, 4  # 8 pairs per thread


@triton.jit
def _rotate(
    q: tl.tensor,
    k: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    batch: tl.tensor,
    q_heads: tl.tensor,
    k_heads: tl.tensor,
    q_stride_s: tl.tensor,
    q_stride_b: tl.tensor,
    q_stride_n: tl.tensor,
    k_stride_s: tl.tensor,
    k_stride_b: tl.tensor,
    k_stride_n: tl.tensor,
    q_out_stride_s: tl.tensor,
    q_out_stride_b: tl.tensor,
    q_out_stride_n: tl.tensor,
    k_out_stride_s: tl.tensor,
    k_out_stride_b: tl.tensor,
    k_out_stride_n: tl.tensor,
    positions_stride_b: tl.tensor,
    positions_stride_s: tl.tensor,
    SIGN: tl.constexpr,
    ADJACENT: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    NUM_UNROTATED: tl.constexpr,
    PAIRS: tl.constexpr,
    UNROTATED: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """Rotate HEADS heads of one token, queries' first, by SIGN times its angles; copy UNROTATED dims unless it is 0."""
    s, b = tl.program_id(0) // batch, tl.program_id(0) % batch
    q_blocks = tl.cdiv(q_heads, HEADS)
    block = tl.program_id(1)
    long_s, long_b = s.to(tl.int64), b.to(tl.int64)
    if block < q_blocks:
        source = q + long_s * q_stride_s + long_b * q_stride_b
        target = q_out + long_s * q_out_stride_s + long_b * q_out_stride_b
        stride, out_stride, num_heads = q_stride_n, q_out_stride_n, q_heads
    else:
        block -= q_blocks
        source = k + long_s * k_stride_s + long_b * k_stride_b
        target = k_out + long_s * k_out_stride_s + long_b * k_out_stride_b
        stride, out_stride, num_heads = k_stride_n, k_out_stride_n, k_heads
    position = long_s
    if positions is not None:
        position = tl.load(positions + long_b * positions_stride_b + long_s * positions_stride_s).to(tl.int64)

    heads = block * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, PAIRS)
    first = pairs * 2 if ADJACENT else pairs
    apart = 1 if ADJACENT else NUM_PAIRS
    angle = position * (2 * NUM_PAIRS) + first
    c = tl.load(cos + angle, pairs < NUM_PAIRS, other=0.0).to(tl.float32)[None, :]
    d = tl.load(sin + angle, pairs < NUM_PAIRS, other=0.0).to(tl.float32)[None, :] * SIGN
    inside = (heads < num_heads)[:, None] & (pairs < NUM_PAIRS)[None, :]
    place, out_place = heads[:, None] * stride + first[None, :], heads[:, None] * out_stride + first[None, :]
    x = tl.load(source + place, inside, other=0.0).to(tl.float32)
    y = tl.load(source + place + apart, inside, other=0.0).to(tl.float32)
    kind = q_out.dtype.element_ty
    tl.store(target + out_place, (x * c - y * d).to(kind), inside)
    tl.store(target + out_place + apart, (y * c + x * d).to(kind), inside)
    if UNROTATED > 0:
        rest = tl.arange(0, UNROTATED)
        inside = (heads < num_heads)[:, None] & (rest < NUM_UNROTATED)[None, :]
        kept = tl.load(source + heads[:, None] * stride + 2 * NUM_PAIRS + rest[None, :], inside)
        tl.store(target + heads[:, None] * out_stride + 2 * NUM_PAIRS + rest[None, :], kept, inside)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _launch(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, call: RotaryCall, sign: float) -> None:
    """Write q and k, rotated, to `q_out` and `k_out`, which may be q and k."""
    length, batch, q_heads, head_dim = q.shape
    k_heads, dim = k.shape[2], call.cos.shape[-1]
    copied = head_dim - dim if q_out is not q else 0
    pairs = _power_of_two(dim // 2)
    heads = min(max(1, PAIRS_PER_PROGRAM // pairs), _power_of_two(max(q_heads, k_heads)))
    positions = call.positions
    _rotate[(length * batch, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))](
        *(q, k, q_out, k_out, call.cos, call.sin, positions, batch, q_heads, k_heads),
        *(*q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3]),
        *(positions.stride() if positions is not None else (0, 0)),
        *(sign, call.adjacent, dim // 2, copied, pairs, _power_of_two(copied) if copied else 0, heads),
        num_warps=NUM_WARPS,
    )


class _Rotary(torch.autograd.Function):
    """Rotation of q and k where they lie.

    The results are views of the inputs, whose unrotated values are gone. Autograd is not asked to follow that as it
    follows in-place operations: it forbids two at once on views, and keys that lie between values. So no other function
    may have saved q or k for its backward pass. Projections, norms and adapters save their inputs, never these results.
    Where a tensor is not a part of a larger one its version is raised, and a function that has saved it fails.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Any, adjacent: bool) -> Any:
        _launch(q, k, q, k, RotaryCall(cos, sin, positions, adjacent), 1.0)
        for one in (q, k):
            if one.requires_grad and (one._base is None or one._base.numel() == one.numel()):
                torch.autograd.graph.increment_version(one)
        ctx.save_for_backward(cos, sin, positions)
        ctx.adjacent = adjacent
        return q, k

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Rotate back: the inverse of a rotation is its transpose."""
        cos, sin, positions = ctx.saved_tensors
        grad_q, grad_k = (_side_by_side(grad) for grad in grads)
        out_q, out_k = (torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) for grad in (grad_q, grad_k))
        _launch(grad_q, grad_k, out_q, out_k, RotaryCall(cos, sin, positions, ctx.adjacent), -1.0)
        return out_q, out_k, None, None, None, None


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rotary(q: Tensor, k: Tensor, call: RotaryCall) -> tuple[Tensor, Tensor]:
    """Compute a `Rotary` in place of q and k."""
    return _Rotary.apply(_side_by_side(q), _side_by_side(k), call.cos, call.sin, call.positions, call.adjacent)
