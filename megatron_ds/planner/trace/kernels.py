"""Stand-ins for the kernels of a GPU: they allocate and save what those do, and record what those read and write.

`layers.kernels.triton` has the kernels themselves, which need Triton and a GPU to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.layers.kernels import REFERENCE, AttentionCall, Kernels, KernelsByCall, LossCall, RotaryCall
from megatron_ds.layers.kernels.by_call import Entry
from megatron_ds.layers.kernels.select import AUTO, TORCH, Choice, check_choice
from megatron_ds.layers.scaled_dot_product import ScaledDotProduct
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.planner.operations import Stream
from megatron_ds.planner.trace.attention_operator import attend, attend_backward
from megatron_ds.planner.trace.recorder import Recorder

_PROGRAMS = 264
"""Programs of a norm's backward pass, each with a row of partial sums: two on each of 132 multiprocessors."""


def stand_ins(wanted: Choice, recorder: Recorder, documents: int) -> Kernels:
    """Return the kernels of a choice of `train.kernels`, where everything but "torch" is one of ours.

    Args:
        wanted: see `layers.kernels.select_kernels`.
        recorder: gets the operations.
        documents: of equal length in each row, where documents share rows.
    """
    check_choice(wanted)
    rms = partial(_rms_norm, recorder)
    found: Mapping[str, Any] = {
        "rms_norm": lambda x, weight, eps: rms(x, weight, False),
        "fp32_rms_norm": lambda x, weight, eps, offset: rms(x, weight, True),
        "add_rms_norm": lambda x, change, weight, eps: _AddRMSNorm.apply(x, change, weight, recorder),
        "swiglu": lambda wide: _Gated.apply(wide, recorder),
        "geglu": lambda wide, approximate: _Gated.apply(wide, recorder),
        "rotary": partial(_rotary, recorder),
        "cross_entropy": partial(_cross_entropy, recorder),
        "attention": KernelsByCall([Entry("fused", _is_fused, lambda *call: partial(_attend, documents))]),
    }

    def is_ours(name: str) -> bool:
        return (wanted if isinstance(wanted, str) else wanted.get(name, AUTO)) != TORCH

    return replace(REFERENCE, **{name: kernel for name, kernel in found.items() if is_ours(name)})


def _stream(recorder: Recorder, name: str, *tensors: Tensor | None) -> None:
    """Record a kernel that reads or writes tensors once."""
    num_bytes = sum(one.nbytes for one in tensors if one is not None)
    if num_bytes:
        recorder.record(Stream(num_bytes, name=name))


def _rms_norm(recorder: Recorder, x: Tensor, weight: Tensor, fp32_weight: bool) -> Tensor:
    return _RMSNorm.apply(x, weight, fp32_weight, recorder)


def _inverse_rms(x: Tensor) -> Tensor:
    return torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)


def _norm_gradients(ctx: Any, recorder: Recorder, *grads: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the normalised tensor and of the weight."""
    x, weight, inverse_rms = ctx.saved_tensors
    grad_x, grad_weight = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    if ctx.wants_weight:
        partial_sums = torch.empty(_PROGRAMS, x.shape[-1], dtype=torch.float32, device=x.device)
        _stream(recorder, "rms_norm_backward", x, inverse_rms, *grads, grad_x, partial_sums)
        grad_weight = partial_sums.sum(0).to(weight.dtype)
    else:
        _stream(recorder, "rms_norm_backward", x, inverse_rms, *grads, grad_x)
    return grad_x, grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fp32_weight: bool, recorder: Recorder) -> Tensor:
        dtype = x.dtype if fp32_weight else torch.promote_types(x.dtype, weight.dtype)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        inverse_rms = _inverse_rms(x)
        _stream(recorder, "rms_norm", x, weight, y, inverse_rms)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.recorder, ctx.wants_weight = recorder, ctx.needs_input_grad[1]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *_norm_gradients(ctx, ctx.recorder, grads[0]), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor, weight: Tensor, recorder: Recorder) -> tuple[Tensor, Tensor]:
        y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse_rms = _inverse_rms(x)
        _stream(recorder, "add_rms_norm", x, change, weight, total, y, inverse_rms)
        ctx.save_for_backward(total, weight, inverse_rms)
        ctx.recorder, ctx.wants_weight = recorder, ctx.needs_input_grad[2]
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return grads[1], grads[1], None, None
        grad_x, grad_weight = _norm_gradients(ctx, ctx.recorder, *grads)
        return grad_x, grad_x, grad_weight, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wide: Tensor, recorder: Recorder) -> Tensor:
        y = torch.empty(*wide.shape[:-1], wide.shape[-1] // 2, dtype=wide.dtype, device=wide.device)
        _stream(recorder, "gated", wide, y)
        ctx.save_for_backward(wide)
        ctx.recorder = recorder
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (wide,) = ctx.saved_tensors
        grad = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
        _stream(ctx.recorder, "gated_backward", wide, grads[0], grad)
        return grad, None


def _rotary(recorder: Recorder, q: Tensor, k: Tensor, call: RotaryCall) -> tuple[Tensor, Tensor]:
    return _Rotary.apply(q, k, call.cos, call.sin, call.positions, recorder)


class _Rotary(torch.autograd.Function):
    """Rotation in place, whose backward pass writes new tensors."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, recorder: Recorder
    ) -> tuple[Tensor, Tensor]:
        _stream(recorder, "rotary", q, q, k, k, cos, sin, positions)
        ctx.save_for_backward(cos, sin, positions)
        ctx.recorder = recorder
        return q, k

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, positions = ctx.saved_tensors
        outs = [torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) for grad in grads]
        _stream(ctx.recorder, "rotary_backward", *grads, *outs, cos, sin, positions)
        return *outs, None, None, None, None


def _cross_entropy(recorder: Recorder, logits: Tensor, labels: Tensor, call: LossCall) -> tuple[Tensor, Tensor]:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    written = logits if call.wants_gradient else None
    if call.axis.size == 1:
        _stream(recorder, "cross_entropy", logits, written, labels, losses)
        return losses, logits
    own_peaks, sums = torch.empty_like(losses), losses.new_empty((2, len(logits)))
    _stream(recorder, "cross_entropy", logits, labels, own_peaks, sums)
    peaks = all_reduce_(own_peaks.clone(), call.axis, dist.ReduceOp.MAX)
    sums[0] *= (own_peaks - peaks).exp_()
    all_reduce_(sums, call.axis)
    losses = sums[0].log() + peaks - sums[1]
    if call.wants_gradient:
        _stream(recorder, "cross_entropy", logits, logits, labels, peaks, sums[0])
    return losses, logits


def _is_fused(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> bool:
    return q.dtype in (torch.float16, torch.bfloat16) and call.dropout == 0.0


def _attend(documents: int, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Compute an `AttentionKernel`."""
    pairs = num_pairs(len(q), len(k), call.causal, call.window, documents if call.positions is not None else 1)
    parts = [part.permute(1, 2, 0, 3) for part in (q, k, v)]
    return _Attend.apply(*parts, call.distance_bias, call.sinks, pairs).permute(2, 0, 1, 3)


def num_pairs(queries: int, keys: int, causal: bool, window: int | None, documents: int) -> int:
    """Return the pairs of a query and a key that a head of a row computes; the queries are the last ones."""
    if documents > 1:
        length = queries // documents
        return documents * num_pairs(length, length, causal, window, 1)
    reach = keys if window is None else min(window, keys)
    if not causal:
        return queries * min(keys, 2 * reach - 1)
    first = keys - queries + 1  # keys that the first query sees
    rising = max(0, min(queries, reach - first))  # queries that see all keys before them
    return rising * (2 * first + rising - 1) // 2 + (queries - rising) * min(reach, max(first, reach))


class _Attend(torch.autograd.Function):
    """Fused attention, (B, N, S, D) and (B, K, C, D) twice: outputs and the log-sum-exp of the scores are saved."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, pairs: int
    ) -> Tensor:
        out, lse = attend(q, k, v, pairs)
        ctx.save_for_backward(q, k, v, out, lse, bias, sinks)
        ctx.pairs = pairs
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, bias, sinks = ctx.saved_tensors
        found = attend_backward(grads[0], q, k, v, out, lse, ctx.pairs)
        others = [None if one is None else torch.empty_like(one) for one in (bias, sinks)]
        return *found, *others, None


def torch_attention() -> ScaledDotProduct:
    """Return torch's own attention as it is on a GPU: fused, with or without a mask."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, **options: Any) -> Tensor:
        pairs = num_pairs(q.shape[2], k.shape[2], options["is_causal"], None, 1)
        bias = mask if mask is not None and mask.requires_grad else None
        return _Attend.apply(q, k, v, bias, None, pairs)

    return attend
