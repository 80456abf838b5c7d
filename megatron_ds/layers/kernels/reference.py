"""The operations that libraries may compute: signatures, PyTorch's formulas, and small inputs for the comparison.

Shapes: S sequence, B batch, N query heads, K key and value heads, D head dim, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of attention besides q (S, B, N, D), k and v (S, B, K, D), with N a multiple of K.

    Attributes:
        scale: factor of the scores.
        window: a query attends to this many last keys; None = to all.
        softcap: bound of the scores; None = they are unbounded.
        positions: (B, S), 0 where a document begins; None = one document per row.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    positions: Tensor | None = None


RMSNorm = Callable[[Tensor, Tensor, float], Tensor]
"""(x, weight, eps) -> weight * (x / rms(x)), the quotient in fp32 and cast down before the product, as Llama does."""
Gated = Callable[[Tensor], Tensor]
"""(..., 2F), gate first -> silu(gate) * up, (..., F)."""
CausalAttention = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]
"""(S, B, N, D), (S, B, K, D) twice -> (S, B, N, D)."""
Random = Callable[..., Tensor]
"""*shape -> a tensor of normally distributed numbers."""


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute an `RMSNorm`; torch's own norm is fp32 inside."""
    return weight * F.rms_norm(x, (x.shape[-1],), None, eps)


def reference_swiglu(wide: Tensor) -> Tensor:
    """Compute a `Gated`."""
    gate, up = wide.chunk(2, dim=-1)
    return F.silu(gate) * up


def reference_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Compute a `CausalAttention` by its formula, step by step."""
    length, heads = q.shape[0], q.shape[2]
    q, k, v = (part.permute(1, 2, 0, 3).float() for part in (q, k, v))
    k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if call.window is not None:
        seen = seen.triu(1 - call.window)
    if call.positions is not None:
        documents = (call.positions == 0).cumsum(1)
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).permute(2, 0, 1, 3)


def norm_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of an `RMSNorm`."""
    return random(3, 2, 64), random(64), 1e-5


def gated_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of a `Gated`."""
    return (random(3, 2, 64),)


def attention_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of a `CausalAttention` with a softcap."""
    call = AttentionCall(0.3, softcap=2.0)
    return random(8, 2, 4, 64), random(8, 2, 2, 64), random(8, 2, 2, 64), call


def documents_input(random: Random) -> tuple[Any, ...]:
    """Return arguments of a `CausalAttention` with a window and several documents per row."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0]], device=random(1).device)
    call = AttentionCall(0.3, window=3, positions=positions)
    return random(8, 2, 4, 64), random(8, 2, 2, 64), random(8, 2, 2, 64), call
