"""What a model is, in the terms of the math and of no framework. Hugging Face configs are translated into this."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from megatron_ds.config import ModelShape
from megatron_ds.layers.alibi import Alibi
from megatron_ds.layers.attention import AttentionShape
from megatron_ds.layers.embedding import PositionTable
from megatron_ds.layers.norm import NormStyle
from megatron_ds.layers.relative_bias import RelativePositions
from megatron_ds.layers.rotary import RotaryConfig

NORM_PLACES = ("input", "output", "both", "sum")


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of blocks. Every option is independent of the others; the defaults are those of most decoders.

    Attributes:
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, ffn_size: sizes, whole.
        norm: of hidden states.

        causal: a position sees none after it.
        cross_attention: between attention and MLP, each block attends to the states of another stack.
        rotary: for each layer, its frequencies; None = no rotation in that layer.
        alibi: biases by distance; None = none.
        relative: learned biases by distance, one table for all blocks; None = none.

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

        attention_dropout, residual_dropout, ffn_dropout: probabilities; the last inside the MLP.
        init_std: of all weights; projections into the residual stream get init_std / sqrt(2 L) where
            `scaled_residual_init` (Radford et al. 2019). Where `fan_in_init`, it is a factor of 1/sqrt(inputs) instead,
            and queries have 1/sqrt(head_dim) in their weights, not in the scores (Raffel et al. 2020).
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm: NormStyle

    causal: bool = True
    cross_attention: bool = False
    rotary: tuple[RotaryConfig | None, ...] = ()
    alibi: Alibi | None = None
    relative: RelativePositions | None = None

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

    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    ffn_dropout: float = 0.0
    init_std: float = 0.02
    scaled_residual_init: bool = False
    fan_in_init: bool = False

    def __post_init__(self) -> None:
        assert self.norm_place in NORM_PLACES, self.norm_place
        assert self.norm_place == "input" or not self.parallel, "parallel blocks have norms at their inputs"
        assert self.parallel or not self.shared_norm, "one norm for both is a parallel block's"
        assert not (self.parallel and self.cross_attention), "cross attention stands between attention and MLP"
        assert self.causal or not any(self.windows), "windows are of keys before the query"
        for name in ("windows", "rotary"):
            assert len(getattr(self, name)) in (0, self.num_layers), (name, getattr(self, name), self.num_layers)

    @property
    def weight_std(self) -> float:
        """Of projections of hidden states, other than queries."""
        return self.init_std * self.hidden_size**-0.5 if self.fan_in_init else self.init_std

    def out_std(self, inputs: int) -> float:
        """Of projections of so many features into the residual stream."""
        if self.fan_in_init:
            return self.init_std * inputs**-0.5
        return self.init_std / math.sqrt(2 * self.num_layers) if self.scaled_residual_init else self.init_std

    def attention(self, layer: int) -> AttentionShape:
        """Sizes and options of one layer's self-attention."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return AttentionShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=scale / (layer + 1) if self.scale_by_layer else scale,
            causal=self.causal,
            qkv_bias=self.qkv_bias,
            out_bias=self.attention_out_bias,
            qk_norm=self.qk_norm,
            qk_norm_across_heads=self.qk_norm_across_heads,
            window=self.windows[layer] if self.windows else None,
            softcap=self.attention_softcap,
            alibi=self.alibi,
            relative=self.relative,
            dropout=self.attention_dropout,
            q_std=self.weight_std * (self.head_dim**-0.5 if self.fan_in_init else 1.0),
            kv_std=self.weight_std,
            out_std=self.out_std(self.num_heads * self.head_dim),
        )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig):
    """A causal language model. As in a `StackConfig`, every option is independent.

    Attributes:
        family: the Hugging Face `model_type` that it was translated from; a label, nothing branches on it.
        vocab_size: V.

        embedding_size: width of the word embedding; a projection leads to the hidden size and back where they differ.
        embedding_multiplier: of the word embedding; `embedding_multiplier_in_dtype`: rounded to its dtype first.
        padding_id: an id whose row of the embedding does not learn as an input; None = none.
        embedding_norm: a norm between embedding and first block.
        positions: table of learned positions; None = none.

        final_norm: a norm after the last block.
        head_bias: of the logits.
        logit_multiplier: of the logits; `logit_softcap`: their bound after that.
        tied: the head is the word embedding.

        embedding_dropout: probability.
    """

    family: str
    vocab_size: int

    embedding_size: int
    padding_id: int | None = None
    embedding_multiplier: float = 1.0
    embedding_multiplier_in_dtype: bool = False
    embedding_norm: bool = False
    positions: PositionTable | None = None

    final_norm: bool = True
    head_bias: bool = False
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    tied: bool

    embedding_dropout: float = 0.0

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """Prefix of the blocks' names -> what they are."""
        return {"blocks": self}

    def shape(self) -> ModelShape:
        """What the run's checks need to know."""
        return _shape(self, self.num_layers, self.vocab_size, self.positions)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(StackConfig):
    """A bidirectional encoder and the heads that it has (Devlin et al. 2019; Liu et al. 2019).

    Attributes:
        family: the Hugging Face `model_type` that it was translated from; a label, nothing branches on it.
        vocab_size: V.
        padding_id: an id whose row of the embedding does not learn as an input; None = none.
        positions: table of learned positions.
        num_token_types: rows of the table of segments.

        masked_lm: it predicts masked tokens, by its word embedding.
        pooler: a vector a sequence, made of the first position's.
        next_sentence: it predicts from that vector whether the second segment follows the first.
        head_activation: of the head that predicts masked tokens, a name in `layers.mlp.ACTIVATIONS`.

        embedding_dropout: probability.
    """

    tied: ClassVar[bool] = True

    family: str
    vocab_size: int
    padding_id: int | None
    positions: PositionTable
    num_token_types: int

    masked_lm: bool = True
    pooler: bool = False
    next_sentence: bool = False
    head_activation: str

    embedding_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = self.pooler if self.masked_lm else False
        assert self.next_sentence == wanted, (
            "beside masked tokens, the pooler serves to predict the next sentence alone"
        )

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """Prefix of the blocks' names -> what they are."""
        return {"blocks": self}

    def shape(self) -> ModelShape:
        """What the run's checks need to know."""
        return _shape(self, self.num_layers, self.vocab_size, self.positions)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """Two stacks, of which the second attends to the first (Raffel et al. 2020), over one word embedding.

    Attributes:
        family: the Hugging Face `model_type` that it was translated from; a label, nothing branches on it.
        vocab_size: V.
        encoder, decoder: the stacks, of one width; each ends with a norm.
        tied: the head is the word embedding.
        logit_multiplier: of the logits.
        embedding_dropout: probability, of word embeddings and of what leaves a stack.
        embedding_std, head_std: of the embedding's initialisation, and of that of a head of its own.
        decoder_start_id: what the decoder reads before the first target.
        padding_id: what stands where there is no token.
    """

    family: str
    vocab_size: int
    encoder: StackConfig
    decoder: StackConfig
    tied: bool
    logit_multiplier: float = 1.0
    embedding_dropout: float = 0.0
    embedding_std: float
    head_std: float
    decoder_start_id: int
    padding_id: int

    def __post_init__(self) -> None:
        assert self.encoder.hidden_size == self.decoder.hidden_size, "the decoder attends to states of its own width"
        assert self.decoder.cross_attention and not self.encoder.cross_attention

    @property
    def hidden_size(self) -> int:
        return self.encoder.hidden_size

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """Prefix of the blocks' names -> what they are."""
        return {"encoder.blocks": self.encoder, "decoder.blocks": self.decoder}

    def shape(self) -> ModelShape:
        """What the run's checks need to know."""
        return _shape(self.encoder, self.encoder.num_layers + self.decoder.num_layers, self.vocab_size, None)


ModelConfig = DecoderConfig | EncoderConfig | EncoderDecoderConfig


def _shape(stack: StackConfig, num_layers: int, vocab_size: int, positions: PositionTable | None) -> ModelShape:
    return ModelShape(
        num_layers=num_layers,
        num_attention_heads=stack.num_heads,
        ffn_size=stack.ffn_size,
        hidden_size=stack.hidden_size,
        vocab_size=vocab_size,
        max_positions=positions.max_positions if positions is not None else None,
    )
