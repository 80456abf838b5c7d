"""FlexAttention (Dong et al. 2024): documents, windows, capped scores, biases and sinks, without (S, S) tensors.

torch.compile makes a kernel for each set of options, which takes some seconds, so the candidate is made when a call
needs it. The masks that it reads by blocks are made once for all layers that a micro-batch passes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ds.layers.documents import document_starts
from megatron_ds.layers.kernels.block_mask import BLOCK, Blocks, all_blocks, causal_blocks, first_visible, near_blocks
from megatron_ds.layers.kernels.reference import AttentionCall, AttentionKernel
from megatron_ds.layers.kernels.table import KERNELS, Candidate

SMALLEST_HEAD, LARGEST_HEAD = 16, 256
SHORTEST = BLOCK  # positions; below it a mask of all pairs is small
SHORTEST_LEARNED = 2048  # with a learned bias, whose gradient the kernel sums by atomic additions
KERNEL_LIMIT = 64  # graphs of one function: windows, shapes, with and without gradients; torch's default is 8
KEPT = 8  # masks: a model has one or two windows, and validation may have another length


class Mask(NamedTuple):
    """The mask of a call, on its device.

    Attributes:
        starts: (B, S), where the document of each position begins; None = one document.
        blocks: the blocks that are seen; None = all of them in full.
    """

    starts: Tensor | None
    blocks: Blocks | None


def make_mask(length: int, call: AttentionCall, device: torch.device) -> Mask:
    """Return the mask of a call on S positions, without an (S, S) tensor; the host does not wait."""
    if not call.causal and call.window is not None:
        return Mask(None, near_blocks(length, call.window, device))
    if not call.causal:
        return Mask(None, all_blocks(length, device) if call.key_mask is not None else None)
    starts = document_starts(call.positions) if call.positions is not None else None
    first = first_visible(length, starts, call.window, device)
    return Mask(starts, causal_blocks(first, is_partial=call.key_mask is not None))


class KeptMasks:
    """The last masks, for the layers that share one: those of other micro-batches have other tensors."""

    def __init__(self) -> None:
        self._kept: deque[tuple[tuple[object, ...], tuple[weakref.ref[Tensor] | None, ...], Mask]] = deque(maxlen=KEPT)

    def mask(self, length: int, call: AttentionCall, device: torch.device) -> Mask:
        """Return `make_mask`; in code that torch.compile traces it is part of the graph and is not kept."""
        if torch.compiler.is_compiling():
            return make_mask(length, call, device)
        key, tensors = (length, device, call.causal, call.window), (call.positions, call.key_mask)
        for kept, references, mask in self._kept:
            alive = [one() if one is not None else None for one in references]
            if kept == key and all(one is other for one, other in zip(alive, tensors)):
                return mask
        mask = make_mask(length, call, device)
        self._kept.append((key, tuple(weakref.ref(one) if one is not None else None for one in tensors), mask))
        return mask


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, call: AttentionCall) -> Tensor:
    """Compute attention: (B, N, S, D), (B, K, S, D) twice -> (B, N, S, D)."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    length = q.shape[2]
    block_mask = None
    if mask.blocks is not None:
        blocks, size = mask.blocks, (BLOCK, BLOCK)
        block_mask = BlockMask((length, length), *blocks, BLOCK_SIZE=size, mask_mod=_mask_of_pair(mask, call))
    score = _score_of_pair(call, length, len(q))
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
    if call.sinks is None:
        return flex_attention(q, k, v, score, block_mask, call.scale, **options)
    y, found = flex_attention(q, k, v, score, block_mask, call.scale, **options, return_aux=AuxRequest(lse=True))
    return _with_sinks(y, found.lse, call.sinks)


def _with_sinks(y: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the output of a softmax that the sinks take part in, (B, N, S, D).

    Their share of exp(lse) + exp(sink) is lost, because they have no value.

    Args:
        y: the output without them.
        lse: (B, N, S), the log-sum-exp of the scores of the keys, with a gradient; -inf where a query sees no key.
        sinks: (N,).
    """
    return (y * torch.sigmoid(lse - sinks.float()[:, None])[..., None]).to(y.dtype)


def _mask_of_pair(mask: Mask, call: AttentionCall) -> Callable[..., Tensor]:
    """Return (batch, head, query, key) -> whether the query sees the key, in blocks that are seen in part.

    The output of a query that sees none is zero, as FlexAttention defines it.
    """
    causal, window, key_mask, starts = call.causal, call.window, call.key_mask, mask.starts

    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i if causal else j >= 0
        if window is not None:
            seen = seen & (i - j < window)
            seen = seen if causal else seen & (j - i < window)
        if starts is not None:
            seen = seen & (j >= starts[b, i])
        if key_mask is not None:
            seen = seen & (key_mask[b, j] != 0)
        return seen

    return is_seen


def _score_of_pair(call: AttentionCall, length: int, batch: int) -> Callable[..., Tensor] | None:
    """Return (score, batch, head, query, key) -> score, capped and with biases; None = it is unchanged."""
    softcap, distance_bias = call.softcap, call.distance_bias
    key_bias = call.key_bias.expand(batch, -1, -1) if call.key_bias is not None else None
    if softcap is None and key_bias is None and distance_bias is None:
        return None

    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if key_bias is not None:
            score = score + key_bias[b, h, j]
        if distance_bias is not None:
            score = score + distance_bias[h, j - i + (length - 1)]
        return score

    return score


@dataclass(frozen=True)
class FlexAttention:
    """An `AttentionKernel` by FlexAttention.

    Attributes:
        run: `attend`, or what torch.compile makes of it.
        masks: the masks of the last calls.
    """

    run: Callable[..., Tensor]
    masks: KeptMasks

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        mask = self.masks.mask(q.shape[0], call, q.device)
        run = attend
        if not torch.compiler.is_compiling():
            run, config = self.run, torch._dynamo.config
            config.recompile_limit = max(config.recompile_limit, KERNEL_LIMIT)  # a thread has settings of its own
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        return run(q, k, v, mask, call).permute(2, 0, 1, 3)


def flex_attention() -> AttentionKernel:
    """Return attention by compiled kernels. A graph that cannot be made is an error: uncompiled it is all pairs."""
    return FlexAttention(torch.compile(attend, dynamic=False, fullgraph=True), KeptMasks())


def supports(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> bool:
    """Return whether FlexAttention computes a call, for which torch's other kernels would need all pairs."""
    learned = call.distance_bias
    if learned is not None and learned.requires_grad and torch.are_deterministic_algorithms_enabled():
        return False
    fits = q.dtype in (torch.float16, torch.bfloat16) and SMALLEST_HEAD <= q.shape[-1] <= LARGEST_HEAD
    is_long = q.shape[0] >= (SHORTEST if learned is None else SHORTEST_LEARNED)
    options = (call.window, call.softcap, call.positions, call.key_bias, call.distance_bias, call.sinks)
    needs_pairs = any(one is not None for one in options) or (call.causal and call.key_mask is not None)
    return fits and is_long and needs_pairs and call.dropout == 0.0 and q.shape[0] == k.shape[0]


KERNELS["attention"].register("flex", Candidate("torch", flex_attention, "torch", supports=supports, deferred=True))
