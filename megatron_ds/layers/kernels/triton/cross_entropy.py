"""Cross entropy over a divided vocabulary, on logits as the matrix product writes them, in half precision too.

The softmax is online (Milakov and Gimelshein 2018): one pass over a row finds its maximum and the sum of exponentials,
a second one writes the gradient over the logits. A program computes one row in fp32; nothing is summed by atomics, so
results are the same in every run. On a tensor axis of size 1 both passes are one launch, and the second one finds most
of its row in the cache; else the ranks' statistics are combined between them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_ds.layers.kernels.cross_entropy import LossCall
from megatron_ds.parallel.collectives import all_reduce_

BLOCK = 8_192  # columns that a program reads at a time: two vectors of 16 bytes a thread in half precision
COLUMNS_PER_WARP = 512


@triton.jit
def _final_logits(
    raw: tl.tensor,
    multiplier: tl.tensor,
    softcap: tl.tensor,
    HAS_CAP: tl.constexpr,
) -> tl.tensor:
    final = raw.to(tl.float32) * multiplier
    if HAS_CAP:
        final = softcap * (1.0 - 2.0 / (tl.exp(2.0 * final / softcap) + 1.0))  # softcap * tanh(final / softcap)
    return final


@triton.jit
def _row_statistics(
    row: tl.tensor,
    valid: tl.tensor,
    label: tl.tensor,
    multiplier: tl.tensor,
    softcap: tl.tensor,
    HAS_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return a row's maximum, its sum of exponentials relative to that, and its label's logit, 0 if it has none.

    Loads are masked by WIDTH, which is a multiple of what a thread loads; `valid` may be any number.
    """
    picked = tl.load(row + label, mask=(label >= 0) & (label < valid), other=0.0)
    peak = -float("inf")
    total = 0.0
    for begin in range(0, WIDTH, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        raw = tl.load(row + columns, mask=columns < WIDTH, other=0.0)
        final = tl.where(columns < valid, _final_logits(raw, multiplier, softcap, HAS_CAP), -float("inf"))
        higher = tl.maximum(peak, tl.max(final, axis=0))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # until now all columns are padding
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(final - base), axis=0)
        peak = higher
    return peak, total, _final_logits(picked, multiplier, softcap, HAS_CAP)


@triton.jit
def _write_row_gradient(
    row: tl.tensor,
    valid: tl.tensor,
    label: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    multiplier: tl.tensor,
    softcap: tl.tensor,
    scale: tl.tensor,
    HAS_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    factor = multiplier * scale
    share = 1.0 / total
    for begin in range(0, WIDTH, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        raw = tl.load(row + columns, mask=columns < WIDTH, other=0.0)
        final = _final_logits(raw, multiplier, softcap, HAS_CAP)
        grad = tl.exp(final - peak) * share - tl.where(columns == label, 1.0, 0.0)
        if HAS_CAP:
            bounded = final / softcap
            grad = grad * (1.0 - bounded * bounded)
        grad = tl.where(columns < valid, grad * factor, 0.0)
        tl.store(row + columns, grad.to(row.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def whole_rows(
    logits: tl.tensor,
    stride: tl.tensor,
    labels: tl.tensor,
    losses: tl.tensor,
    valid: tl.tensor,
    multiplier: tl.tensor,
    softcap: tl.tensor,
    scale: tl.tensor,
    HAS_CAP: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the loss of a row that has all columns and, where wanted, its gradient over its logits."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    label = tl.load(labels + token)
    peak, total, picked = _row_statistics(row, valid, label, multiplier, softcap, HAS_CAP, WIDTH, BLOCK)
    tl.store(losses + token, tl.log(total) + peak - picked)
    if WANTS_GRADIENT:
        tl.debug_barrier()  # every warp has read the label's logit
        _write_row_gradient(row, valid, label, peak, total, multiplier, softcap, scale, HAS_CAP, WIDTH, BLOCK)


@triton.jit
def part_statistics(
    logits: tl.tensor,
    stride: tl.tensor,
    labels: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    picked: tl.tensor,
    start: tl.tensor,
    valid: tl.tensor,
    multiplier: tl.tensor,
    softcap: tl.tensor,
    HAS_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the statistics of a row of which other ranks have further columns."""
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token) - start
    peak, total, own = _row_statistics(
        logits + token * stride, valid, label, multiplier, softcap, HAS_CAP, WIDTH, BLOCK
    )
    tl.store(peaks + token, peak)
    tl.store(totals + token, total)
    tl.store(picked + token, own)


@triton.jit
def part_gradients(
    logits: tl.tensor,
    stride: tl.tensor,
    labels: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    start: tl.tensor,
    valid: tl.tensor,
    multiplier: tl.tensor,
    softcap: tl.tensor,
    scale: tl.tensor,
    HAS_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write a row's gradient over its logits, from the statistics of all columns."""
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token) - start
    peak, total = tl.load(peaks + token), tl.load(totals + token)
    _write_row_gradient(
        logits + token * stride, valid, label, peak, total, multiplier, softcap, scale, HAS_CAP, WIDTH, BLOCK
    )


def cross_entropy(logits: Tensor, labels: Tensor, call: LossCall) -> tuple[Tensor, Tensor]:
    """Compute a `CrossEntropy`; the rows may be further apart than they are long."""
    tokens, width = logits.shape
    assert width == 0 or logits.stride(1) == 1, logits.stride()
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    if tokens == 0:
        return losses, logits
    labels = labels.contiguous()
    cap = call.finish.softcap
    numbers = {"multiplier": call.finish.multiplier, "softcap": cap if cap is not None else 1.0}
    block = min(BLOCK, triton.next_power_of_2(max(width, 32)))
    fixed = {"HAS_CAP": cap is not None, "WIDTH": width, "BLOCK": block, "num_warps": max(1, block // COLUMNS_PER_WARP)}
    rows = (logits, logits.stride(0), labels)
    if call.axis.size == 1:
        wants = {"WANTS_GRADIENT": call.wants_gradient}
        whole_rows[(tokens,)](*rows, losses, call.valid, **numbers, scale=call.scale, **fixed, **wants)
        return losses, logits
    own_peaks, sums = torch.empty_like(losses), losses.new_empty((2, tokens))
    part_statistics[(tokens,)](*rows, own_peaks, sums[0], sums[1], call.start, call.valid, **numbers, **fixed)
    peaks = all_reduce_(own_peaks.clone(), call.axis, dist.ReduceOp.MAX)
    sums[0] *= (own_peaks - peaks).exp_()
    all_reduce_(sums, call.axis)
    losses = sums[0].log() + peaks - sums[1]
    if call.wants_gradient:
        part_gradients[(tokens,)](*rows, peaks, sums[0], call.start, call.valid, **numbers, scale=call.scale, **fixed)
    return losses, logits
