"""What a decoder is, in the terms of the math and of no framework. Hugging Face configs are translated into this."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_ds.config import ModelShape
from megatron_ds.layers.alibi import Alibi
from megatron_ds.layers.attention import AttentionShape
from megatron_ds.layers.embedding import PositionTable
from megatron_ds.layers.norm import NormStyle
from megatron_ds.layers.rotary import RotaryConfig

NORM_PLACES = ("input", "output", "both", "sum")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal decoder. Every option is independent of the others; the defaults are those of most models.

    Attributes:
        family: the Hugging Face `model_type` that it was translated from; a label, nothing branches on it.
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, ffn_size: sizes, whole.
        norm: of hidden states.

        embedding_size: width of the word embedding; a projection leads to the hidden size and back where they differ.
        embedding_multiplier: of the word embedding; `embedding_multiplier_in_dtype`: rounded to its dtype first.
        padding_id: an id whose row of the embedding does not learn as an input; None = none.
        embedding_norm: a norm between embedding and first block.
        positions: table of learned positions; None = none.
        rotary: for each layer, its frequencies; None = no rotation in that layer.
        alibi: biases by distance; None = none.

        norm_place: where a block's norms stand: "input" (of attention and MLP), "output" (before it is added), "both",
            or "sum" (after it is added).
        parallel: attention and MLP both start from the block's input; `shared_norm`: through one norm.
        residual_multiplier: of what attention and MLP add.

        qkv_bias, attention_out_bias, mlp_bias: which projections have biases.
        qk_norm: RMSNorm of queries and keys before the rotation; `qk_norm_across_heads`: of all heads together.
        attention_scale: of the scores; None = 1/sqrt(head_dim). `scale_by_layer`: divided by the layer's number from 1.
        attention_softcap: bound of the scores; None = none.
        windows: for each layer, how many last keys a query sees; None = all. Empty = all in every layer.

        activation: a name in `layers.mlp.ACTIVATIONS`; `gated`: act(gate) * up instead of act(up).

        final_norm: a norm after the last block.
        head_bias: of the logits.
        logit_multiplier: of the logits; `logit_softcap`: their bound after that.
        tied: the head is the word embedding.

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
    norm: NormStyle

    embedding_size: int
    padding_id: int | None = None
    embedding_multiplier: float = 1.0
    embedding_multiplier_in_dtype: bool = False
    embedding_norm: bool = False
    positions: PositionTable | None = None
    rotary: tuple[RotaryConfig | None, ...] = ()
    alibi: Alibi | None = None

    norm_place: str = "input"
    parallel: bool = False
    shared_norm: bool = False
    residual_multiplier: float = 1.0

    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: NormStyle | None = None
    qk_norm_across_heads: bool = False
    attention_scale: float | None = None
    scale_by_layer: bool = False
    attention_softcap: float | None = None
    windows: tuple[int | None, ...] = ()

    activation: str
    gated: bool = False

    final_norm: bool = True
    head_bias: bool = False
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    tied: bool

    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    init_std: float = 0.02
    scaled_residual_init: bool = False

    def __post_init__(self) -> None:
        assert self.norm_place in NORM_PLACES, self.norm_place
        assert self.norm_place == "input" or not self.parallel, "parallel blocks have norms at their inputs"
        assert self.parallel or not self.shared_norm, "one norm for both is a parallel block's"
        for name in ("windows", "rotary"):
            assert len(getattr(self, name)) in (0, self.num_layers), (name, getattr(self, name), self.num_layers)

    @property
    def out_std(self) -> float:
        return self.init_std / math.sqrt(2 * self.num_layers) if self.scaled_residual_init else self.init_std

    def attention(self, layer: int) -> AttentionShape:
        """Sizes and options of one layer's attention."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return AttentionShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=scale / (layer + 1) if self.scale_by_layer else scale,
            qkv_bias=self.qkv_bias,
            out_bias=self.attention_out_bias,
            qk_norm=self.qk_norm,
            qk_norm_across_heads=self.qk_norm_across_heads,
            window=self.windows[layer] if self.windows else None,
            softcap=self.attention_softcap,
            alibi=self.alibi,
            dropout=self.attention_dropout,
            std=self.init_std,
            out_std=self.out_std,
        )

    def shape(self) -> ModelShape:
        """What the run's checks need to know."""
        return ModelShape(
            num_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            ffn_size=self.ffn_size,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_positions=self.positions.max_positions if self.positions is not None else None,
        )
