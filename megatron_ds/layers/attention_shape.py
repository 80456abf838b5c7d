"""Sizes and options of attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.layers.adapter_layers import AdaptableWeight
from megatron_ds.layers.alibi import Alibi
from megatron_ds.layers.norm import NormStyle
from megatron_ds.layers.relative_bias import RelativePositions


@dataclass(frozen=True)
class QueryTemperature:
    """A factor of queries that grows with their positions p: 1 + beta * ln(1 + floor(p / length)) (Llama 4, 2025).

    Attributes:
        beta: the growth.
        length: positions below it have the factor 1.
    """

    beta: float
    length: int

    def __post_init__(self) -> None:
        assert self.length > 0, self

    def scale(self, q: Tensor, positions: Tensor | None) -> Tensor:
        """Multiply queries (S, B, heads, D) by the factors of their positions (B or 1, S); None = 0..S-1.

        The factors are computed in fp32 and rounded to the dtype of the queries.
        """
        places = torch.arange(q.shape[0], device=q.device)[:, None] if positions is None else positions.t()
        factors = 1.0 + self.beta * torch.log(1.0 + torch.floor(places / self.length))
        return q * factors.to(q.dtype)[..., None, None]


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and options of one attention layer.

    Attributes:
        hidden_size, num_heads, num_kv_heads, head_dim: H, N, K, D.
        scale: factor of the scores.
        causal: a query sees no later key; else it sees all.
        qkv_bias, out_bias: which projections have a bias.
        qk_norm: norm of queries and keys; None = no such norm. It is before the rotation, or `qk_norm_after_rotary`.
        qk_norm_across_heads: this norm is over all heads of a token at once instead of over each head.
        qk_norm_each_head: every head has a weight of its own; else all heads share one.
        query_temperature: growth of the scores with the query's position, after rotation and norm; None = no growth.
        window: a query sees the keys less than this far from it, its own included: with causality these are its last
            ones, without it those on both sides; None = all.
        softcap: scores s become softcap * tanh(s / softcap); None = they are unbounded.
        alibi: fixed biases by distance; None = no such biases.
        relative: learned biases by distance; None = no such biases.
        sinks: each query head has a learned score that takes part in the softmax of every query, as of a further key
            without a value (gpt-oss, 2025; Xiao et al. 2023).
        dropout: the dropout probability of the attention probabilities.
        q_std, kv_std, out_std: standard deviations of the projections' initialisation; sinks have that of keys.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool
    qkv_bias: bool
    out_bias: bool
    qk_norm: NormStyle | None
    qk_norm_across_heads: bool
    window: int | None
    softcap: float | None
    alibi: Alibi | None
    relative: RelativePositions | None
    dropout: float
    q_std: float
    kv_std: float
    out_std: float
    sinks: bool = False
    qk_norm_each_head: bool = False
    qk_norm_after_rotary: bool = False
    query_temperature: QueryTemperature | None = None

    @property
    def width(self) -> int:
        """Number of features of all query heads, N * D."""
        return self.num_heads * self.head_dim

    @property
    def kv_cost(self) -> int:
        """Multiplications per position of the projections of keys and values."""
        return 2 * self.hidden_size * self.num_kv_heads * self.head_dim

    @property
    def cost(self) -> int:
        """Multiplications per position of all projections; those of queries with keys are not counted."""
        return 2 * self.hidden_size * self.width + self.kv_cost

    @property
    def adaptable_weights(self) -> tuple[AdaptableWeight, ...]:
        """The weights that adapters can change."""
        return (
            AdaptableWeight("qkv.q_weight", ("q",), is_column=True),
            AdaptableWeight("qkv.kv_weight", ("k", "v"), is_column=True),
            AdaptableWeight("out.weight", ("out",), is_column=False),
        )
