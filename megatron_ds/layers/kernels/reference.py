"""The operations that libraries may compute: signatures, PyTorch's formulas, and small inputs for the comparison.

Shapes: S sequence, B batch, N query heads, K key and value heads, D head dim, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of attention besides q (S, B, N, D), k and v (S, B, K, D), with N a multiple of K.

    Kernels that support it take fewer queries than keys, which are then the last ones of S positions.

    Attributes:
        scale: factor of the scores.
        window: a query attends to keys less than this far from it: with causality to this many last ones, without it
            on both sides; None = to all.
        softcap: bound of the scores; None = they are unbounded.
        positions: (B, S), 0 where a document begins; None = one document per row.
        causal: a query attends to no later key; else to all.
        bounds: (B, D + 1) int32, the positions where the documents of a row begin, then S; None = nobody has found
            them on the host, or one document per row.
        longest: bound of the length of documents, known to the host; None = S.
        key_mask: (B, S), nonzero where a position may be attended to; None = everywhere. The output of a query that
            sees no key is zero.
        key_bias: (B or 1, N, S), added to the scores of each key: ALiBi; None = no such bias.
        distance_bias: (N, 2S - 1), added to the scores by key - query + S - 1, with a gradient; None = no such bias.
        sinks: (N,), scores of a further key without a value that every query of a head sees, with a gradient; None = no
            such key.
        dropout: probability of dropping an attention probability.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    positions: Tensor | None = None
    causal: bool = True
    bounds: Tensor | None = None
    longest: int | None = None
    key_mask: Tensor | None = None
    key_bias: Tensor | None = None
    distance_bias: Tensor | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """True for causal attention to a window, documents or all, with or without a softcap, and nothing else."""
        others = (self.key_mask, self.key_bias, self.distance_bias, self.sinks)
        return self.causal and self.dropout == 0.0 and all(one is None for one in others)

    @property
    def variant(self) -> tuple[bool, ...]:
        """The options that a kernel made for a call depends on; masks are data."""
        both_sides = None if self.causal else self.window
        optional = (self.softcap, self.key_mask, self.key_bias, self.distance_bias, self.sinks, both_sides)
        return (self.causal, *(one is not None for one in optional))


@dataclass(frozen=True)
class RotaryCall:
    """The arguments of a rotation besides q (S, B, N, D) and k (S, B, K, D).

    Attributes:
        cos, sin: (positions, 1, 1, dim), contiguous; the first `dim` dims of a head are rotated.
        positions: (B, S), the row of the tables for each token; None = 0..S-1.
        adjacent: pairs are neighbours instead of dim/2 apart.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | None = None
    adjacent: bool = False


RMSNorm = Callable[[Tensor, Tensor, float], Tensor]
"""(x, weight, eps) -> weight * (x / rms(x)), the quotient in fp32 and cast down before the product, as Llama does."""
AddRMSNorm = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(x, change, weight, eps) -> (`RMSNorm` of the sum, x + change), the sum rounded before it is normalised."""
FP32RMSNorm = Callable[[Tensor, Tensor, float, float], Tensor]
"""(x, weight, eps, offset) -> (offset + weight) * (x / rms(x)), in fp32 and cast down last (Gemma, OLMo 2)."""
Gated = Callable[[Tensor], Tensor]
"""(..., 2F), gate first -> silu(gate) * up, (..., F)."""
GeGLU = Callable[[Tensor, str], Tensor]
"""(wide, approximate) -> gelu(gate) * up, as `Gated`; approximate is "none" or "tanh", as torch's gelu has it."""
Rotary = Callable[[Tensor, Tensor, RotaryCall], tuple[Tensor, Tensor]]
"""(q, k, call) -> both rotated; it may overwrite q and k, whose values must not be needed any more."""
AttentionKernel = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]
"""(S, B, N, D), (S, B, K, D) twice -> (S, B, N, D), for the calls that its candidate supports."""
Random = Callable[..., Tensor]
"""*shape -> a tensor of normally distributed numbers."""
Example = Callable[[Random], tuple[Any, ...]]
"""Arguments of a kernel from random tensors."""


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute an `RMSNorm`; torch's own norm is fp32 inside."""
    return weight * F.rms_norm(x, (x.shape[-1],), None, eps)


def reference_add_rms_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute an `AddRMSNorm`."""
    total = x + change
    return reference_rms_norm(total, weight, eps), total


def reference_fp32_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """Compute an `FP32RMSNorm`."""
    return (F.rms_norm(x.float(), (x.shape[-1],), None, eps) * (offset + weight.float())).type_as(x)


def reference_swiglu(wide: Tensor) -> Tensor:
    """Compute a `Gated`."""
    gate, up = wide.chunk(2, dim=-1)
    return F.silu(gate) * up


def reference_geglu(wide: Tensor, approximate: str) -> Tensor:
    """Compute a `GeGLU`."""
    gate, up = wide.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up


def reference_rotary(q: Tensor, k: Tensor, call: RotaryCall) -> tuple[Tensor, Tensor]:
    """Compute a `Rotary`."""
    cos, sin, dim = call.cos, call.sin, call.cos.shape[-1]
    if call.positions is not None:
        cos, sin = (table[call.positions.t(), 0] for table in (cos, sin))

    def rotated(x: Tensor) -> Tensor:
        turned = x[..., :dim]
        pairs = turned.unflatten(-1, (-1, 2)) if call.adjacent else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
        swapped = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1)
        swapped = swapped if call.adjacent else swapped.transpose(-1, -2)
        return torch.cat([turned * cos + swapped.flatten(-2) * sin, x[..., dim:]], dim=-1)

    return rotated(q), rotated(k)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Compute an `AttentionKernel` by its formula, step by step."""
    length, heads = k.shape[0], q.shape[2]
    queries = slice(length - q.shape[0], length)
    q, k, v = (part.permute(1, 2, 0, 3).float() for part in (q, k, v))
    k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.key_bias is not None:
        scores = scores + call.key_bias.float()[:, :, None]
    if call.distance_bias is not None:
        scores = scores + call.distance_bias.float().unfold(1, length, 1).flip(1)[:, queries]
    seen = reference_mask(length, call, q.device)[:, :, queries]
    sees_any = seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & sees_any, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    y = scores.softmax(-1)[..., :length] @ v
    return torch.where(sees_any, y, 0.0).permute(2, 0, 1, 3)


def reference_mask(length: int, call: AttentionCall, device: torch.device) -> Tensor:
    """Return the mask of the keys that each query sees, (B or 1, 1, S, S) bool; the output of one without is zero."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)[None, None]
    if call.causal:
        seen = seen.tril()
    if call.window is not None:
        seen = seen.triu(1 - call.window).tril(call.window - 1)
    if call.positions is not None:
        documents = (call.positions == 0).cumsum(1)
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return seen if call.key_mask is None else seen & call.key_mask.bool()[:, None, None, :]


def norm_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of an `RMSNorm`."""
    return random(3, 2, 64), random(64), 1e-5


def heads_norm_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of an `RMSNorm` of heads that are a part of a larger tensor."""
    return random(3, 2, 5, 2, 48).select(-2, 0), random(48), 1e-6


def add_norm_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of an `AddRMSNorm`."""
    return random(3, 2, 64), random(3, 2, 64), random(64), 1e-5


def fp32_norm_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of an `FP32RMSNorm` as Gemma has it."""
    return random(3, 2, 64), random(64), 1e-5, 1.0


def gated_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of a `Gated`."""
    return (random(3, 2, 64),)


def gelu_gated_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of a `GeGLU`."""
    return random(3, 2, 64), "none"


def gelu_tanh_gated_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of a `GeGLU` with the approximation by tanh."""
    return random(3, 2, 64), "tanh"


def rotary_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of a `Rotary` of whole heads."""
    angles = random(8, 1, 1, 16)
    return random(8, 2, 4, 32), random(8, 2, 2, 32), RotaryCall(*_of_halves(angles))


def documents_rotary_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of a `Rotary` of neighbours in a part of each head, at given positions."""
    angles = random(8, 1, 1, 8).repeat_interleave(2, dim=-1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0]], device=angles.device)
    return random(8, 2, 4, 32), random(8, 2, 2, 32), RotaryCall(angles.cos(), angles.sin(), positions, adjacent=True)


def _of_halves(angles: Tensor) -> tuple[Tensor, Tensor]:
    pairs = torch.cat([angles, angles], dim=-1)
    return pairs.cos(), pairs.sin()


def attention_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of an `AttentionKernel` with a softcap."""
    call = AttentionCall(0.3, softcap=2.0)
    return random(8, 2, 4, 64), random(8, 2, 2, 64), random(8, 2, 2, 64), call


def documents_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of an `AttentionKernel` with a window and several documents per row."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0]], device=random(1).device)
    call = AttentionCall(0.3, window=3, positions=positions)
    return random(8, 2, 4, 64), random(8, 2, 2, 64), random(8, 2, 2, 64), call


def bounds_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of an `AttentionKernel` with several documents per row, their bounds, and some without a token.

    The head dim is 128, and several query heads share a key head.
    """
    device = random(1).device
    positions = torch.tensor([[*range(100), *range(60), *range(32)], [*range(192)]], device=device)
    bounds = torch.tensor([[0, 100, 160, 192, 192], [0, 192, 192, 192, 192]], dtype=torch.int32, device=device)
    call = AttentionCall(0.1, positions=positions, bounds=bounds, longest=192)
    return random(192, 2, 4, 128), random(192, 2, 2, 128), random(192, 2, 2, 128), call


def sinks_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of an `AttentionKernel` with sinks."""
    call = AttentionCall(0.3, sinks=random(4))
    return random(8, 2, 4, 64), random(8, 2, 2, 64), random(8, 2, 2, 64), call


def last_queries_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of an `AttentionKernel` with the last queries alone, and a window."""
    return random(5, 2, 4, 64), random(9, 2, 2, 64), random(9, 2, 2, 64), AttentionCall(0.3, window=6)


def is_plain_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> bool:
    """Return whether these are arguments that every `AttentionKernel` computes."""
    return is_plain_of_last_queries(q, k, v, call) and q.shape[0] == k.shape[0]


def is_plain_of_last_queries(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> bool:
    """Return whether these are arguments of plain attention of all queries, or of the last ones of one document."""
    is_whole = q.shape[0] == k.shape[0]
    return call.is_plain and q.dtype in (torch.float16, torch.bfloat16) and (is_whole or call.positions is None)


def attention_variant(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[bool, ...]:
    """Return the options of a call that a check of their own is for."""
    return call.variant


def smaller_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Example:
    """Return an example of a few hundred positions with the options of a call; documents, too, if it is causal."""
    heads, groups, dim = q.shape[2], q.shape[2] // k.shape[2], q.shape[3]
    length, heads = 192, min(heads, 2 * groups)

    def example(random: Random) -> tuple[Any, ...]:
        device = random(1).device
        shared = random(length, 2, heads // groups, dim), random(length, 2, heads // groups, dim)
        positions = torch.tensor([[*range(100), *range(92)], [*range(length)]], device=device)
        small = replace(
            call,
            window=None if call.window is None else min(call.window, 50),
            positions=positions if call.causal else None,
            bounds=None,
            longest=None,
            key_mask=None if call.key_mask is None else torch.arange(length, device=device).expand(2, -1) < 180,
            key_bias=None if call.key_bias is None else random(1, heads, length),
            distance_bias=None if call.distance_bias is None else random(heads, 2 * length - 1).float(),
            sinks=None if call.sinks is None else random(heads),
        )
        return random(length, 2, heads, dim), *shared, small

    return example
