"""What a decoder is, in the terms of the math and of no framework. Hugging Face configs are translated into this."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ds.config import ModelShape
from megatron_ds.layers.attention import AttentionShape
from megatron_ds.layers.rotary import RotaryConfig


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm causal decoder: GPT-2, and the Llama family.

    Attributes:
        family: the Hugging Face `model_type` that it was translated from; a label, nothing branches on it.
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, ffn_size: sizes, whole.
        max_positions: rows of the learned position table, or the length a rotary model was made for.
        rotary: frequencies; None = learned positions.
        norm: "rms" or "layer".
        activation: a name in `layers.mlp.ACTIVATIONS`.
        gated: act(gate) * up instead of act(up).
        qkv_bias, attention_out_bias, mlp_bias: which projections have biases.
        qk_norm: RMSNorm of each query and key head before the rotation.
        tied: the head is the word embedding.
        windows: for each layer, how many last keys a query sees; None = all.
        embedding_dropout, attention_dropout, residual_dropout: probabilities.
        init_std: of all weights; projections into the residual stream get init_std / sqrt(2 L) where
            `scaled_residual_init` (Radford et al. 2019).
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    rotary: RotaryConfig | None
    norm: str
    norm_eps: float
    activation: str
    gated: bool
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int | None, ...]
    embedding_dropout: float
    attention_dropout: float
    residual_dropout: float
    init_std: float
    scaled_residual_init: bool

    @property
    def out_std(self) -> float:
        return self.init_std / math.sqrt(2 * self.num_layers) if self.scaled_residual_init else self.init_std

    def attention(self, layer: int) -> AttentionShape:
        """Sizes and options of one layer's attention."""
        return AttentionShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            out_bias=self.attention_out_bias,
            qk_norm_eps=self.norm_eps if self.qk_norm else None,
            window=self.windows[layer],
            dropout=self.attention_dropout,
            std=self.init_std,
            out_std=self.out_std,
        )

    def shape(self) -> ModelShape:
        """What the run's checks need to know."""
        return ModelShape(
            num_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            ffn_size=self.ffn_size,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_positions=self.max_positions if self.rotary is None else None,
        )
