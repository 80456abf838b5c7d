"""BLOOM: ALiBi, a norm after the embedding, fused Q, K and V grouped by head."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import quotient
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, fused_qkv, linear, norm
from megatron_ds.hf.tensor_mapping import copy
from megatron_ds.layers.alibi import Alibi
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(
    mapped=frozenset(
        [
            "vocab_size",
            "hidden_size",
            "n_embed",
            "n_layer",
            "n_head",
            "num_hidden_layers",
            "num_attention_heads",
            "hidden_dropout",
            "attention_dropout",
            "layer_norm_epsilon",
            "initializer_range",
            "tie_word_embeddings",
        ]
    ),
    equal={
        "apply_residual_connection_post_layernorm": (False,),
        "slow_but_exact": (False,),  # it omits biases
        "n_inner": (None,),
    },
    cosmetic=frozenset(
        # options of the authors' own code
        [
            "pad_token_id",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "skip_bias_add",
            "skip_bias_add_qkv",
            "offset_alibi",
            "seq_length",
        ]
    ),
)


def translate(config: Any) -> DecoderConfig:
    """Translate a BloomConfig."""
    return DecoderConfig(
        family="bloom",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=quotient(config, "hidden_size", "n_head"),
        ffn_size=4 * config.hidden_size,
        norm=NormStyle("layer", config.layer_norm_epsilon),
        embedding_size=config.hidden_size,
        embedding_norm=True,
        alibi=Alibi(),
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        activation="gelu_tanh",
        tied=config.tie_word_embeddings,
        attention_dropout=config.attention_dropout,
        residual_dropout=config.hidden_dropout,
        init_std=config.initializer_range,
    )


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `transformer.` is the base model's prefix."""
    native, theirs = "blocks.{n}", "transformer.h.{n}"
    attention, mlp = f"{theirs}.self_attention", f"{theirs}.mlp"
    return [
        Row(EMBEDDING, ("transformer.word_embeddings.weight",), copy("v e"), "v"),
        *norm("entry.norm", "transformer.word_embeddings_layernorm", config.norm),
        *norm(f"{native}.attention_norm", f"{theirs}.input_layernorm", config.norm),
        *fused_qkv(f"{native}.attention.qkv", f"{attention}.query_key_value", "(k [1|1|1] d)", bias=True),
        *linear(f"{native}.attention.out", f"{attention}.dense", "h (n d)", "n", bias=True),
        *norm(f"{native}.mlp_norm", f"{theirs}.post_attention_layernorm", config.norm),
        *linear(f"{native}.mlp.up", f"{mlp}.dense_h_to_4h", "f h", "f", bias=True),
        *linear(f"{native}.mlp.down", f"{mlp}.dense_4h_to_h", "h f", "f", bias=True),
        *norm("exit.norm", "transformer.ln_f", config.norm),
        Row(HEAD, ("lm_head.weight",), copy("v e"), "v"),
    ]


BLOOM = Family("bloom", "BloomForCausalLM", "transformer.", FIELDS, translate, rows)

FAMILIES = (BLOOM,)
