"""Causal self-attention with grouped query heads (Ainslie et al. 2023), divided over the tensor axis by group."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.layers.norm import Norm
from megatron_ds.layers.recompute import Recompute
from megatron_ds.layers.rotary import RotaryTable, rotate
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and options of one attention layer.

    Attributes:
        hidden_size, num_heads, num_kv_heads, head_dim: H, N, K, D.
        qkv_bias, out_bias: which projections have a bias.
        qk_norm_eps: RMSNorm of each query and key head over D before the rotation; None = no such norm.
        window: a query sees this many last keys, itself included; None = all.
        dropout: on the attention probabilities.
        std, out_std: initialisation of the projections in and out.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    qk_norm_eps: float | None
    window: int | None
    dropout: float
    std: float
    out_std: float


class CausalSelfAttention(nn.Module):
    """(S, B, H) -> (S, B, H), sequence split over t under sequence parallelism; each rank holds K/t groups.

    Queries, keys and values are one matrix whose rows run group by group: G query heads, the key head, the value
    head. Only that order survives a plain concatenation of shards when t changes.

    Args:
        shape: sizes and options.
        tp: the tensor axis; t divides K.
        rotary: shared table of angles; None = no rotation.
        recompute: how the core is kept for the backward pass.
        rng: masks of the probabilities differ between tensor ranks, which hold different heads.
    """

    def __init__(
        self,
        shape: AttentionShape,
        tp: TensorParallel,
        rotary: RotaryTable | None,
        recompute: Recompute,
        rng: RngStreams | None,
    ) -> None:
        super().__init__()
        self.shape, self.rotary, self.recompute, self.rng = shape, rotary, recompute, rng
        self.group = shape.num_heads // shape.num_kv_heads
        heads_a_group = self.group + 2
        self.qkv = ColumnParallelLinear(
            shape.hidden_size,
            (shape.num_kv_heads * heads_a_group * shape.head_dim,),
            tp,
            std=shape.std,
            bias=shape.qkv_bias,
        )
        self.out = RowParallelLinear(
            shape.num_heads * shape.head_dim, shape.hidden_size, tp, std=shape.out_std, bias=shape.out_bias
        )
        eps = shape.qk_norm_eps
        self.q_norm = Norm(shape.head_dim, "rms", eps, tp, tp.inside) if eps is not None else None
        self.k_norm = Norm(shape.head_dim, "rms", eps, tp, tp.inside) if eps is not None else None

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """key_mask (B, S), nonzero where a position may be attended to; None = everywhere."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.group + 2, self.shape.head_dim))
        q, k, v = qkv[..., : self.group, :], qkv[..., self.group, :], qkv[..., self.group + 1, :]
        q = q.flatten(2, 3)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            cos, sin = self.rotary.cos_sin(q.shape[0], like=q)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        core = self.recompute.run("selective", self._core, q, k, v, key_mask)
        return self.out(core)

    def _core(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """(S, B, N/t, D), (S, B, K/t, D) twice -> (S, B, N/t * D)."""
        mask = allowed_keys(q.shape[0], self.shape.window, key_mask, q.device)
        dropout = self.shape.dropout if self.training else 0.0
        with self.rng.sharded() if dropout > 0.0 and self.rng is not None else nullcontext():
            q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
            if mask is not None and self.group > 1:
                # on CUDA only the flash kernel shares heads by itself, and it takes no mask
                k, v = (part.repeat_interleave(self.group, dim=1) for part in (k, v))
            y = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, enable_gqa=mask is None and self.group > 1
            )
        return y.permute(2, 0, 1, 3).flatten(2)


def allowed_keys(length: int, window: int | None, key_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """(B or 1, 1, S, S) bool: which keys each query sees; None where plain causality says it all."""
    if key_mask is None and (window is None or window >= length):
        return None
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None and window < length:
        allowed = allowed.triu(1 - window)
    if key_mask is None:
        return allowed[None, None]
    return allowed & key_mask.bool()[:, None, None, :]
