"""Falcon in three layouts: RW (ALiBi, no shared key heads), 7B (one key head), 40B and later (groups, two norms)."""

from __future__ import annotations

from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation, quotient, rotary
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, fused_qkv, linear, norm
from megatron_ds.hf.tensor_mapping import copy
from megatron_ds.layers.alibi import Alibi
from megatron_ds.layers.norm import NormStyle
from megatron_ds.layers.rotary import RotaryConfig
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(
    mapped=frozenset(
        [
            "vocab_size",
            "hidden_size",
            "n_embed",
            "num_hidden_layers",
            "num_attention_heads",
            "num_kv_heads",
            "ffn_hidden_size",
            "num_ln_in_parallel_attn",
            "layer_norm_epsilon",
            "initializer_range",
            "alibi",
            "new_decoder_architecture",
            "multi_query",
            "parallel_attn",
            "bias",
            "activation",
            "max_position_embeddings",
            "tie_word_embeddings",
            "rope_parameters",
            "rope_theta",
            "rope_scaling",
            "partial_rotary_factor",
        ]
    ),
    equal={
        "apply_residual_connection_post_layernorm": (False,),
        # transformers applies it to the sum of attention and MLP, or not at all, depending on the layout
        "attention_dropout": (0.0,),
        "hidden_dropout": (0.0,),
    },
    cosmetic=frozenset({"pad_token_id"}),
)


def translate(config: Any) -> DecoderConfig:
    """Translate a FalconConfig."""
    _check_layout(config)
    head_dim = quotient(config, "hidden_size", "num_attention_heads")
    bias = bool(config.bias)
    return DecoderConfig(
        family="falcon",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=_num_kv_heads(config),
        head_dim=head_dim,
        ffn_size=config.ffn_hidden_size,
        norm=NormStyle("layer", config.layer_norm_epsilon),
        embedding_size=config.hidden_size,
        rotary=() if config.alibi else (_rope(config, head_dim),) * config.num_hidden_layers,
        alibi=Alibi(scale=head_dim**-0.5, bf16=True) if config.alibi else None,
        parallel=bool(config.parallel_attn),
        shared_norm=bool(config.parallel_attn) and _num_norms(config) == 1,
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        activation=activation("activation", config.activation),
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range,
    )


def _check_layout(config: Any) -> None:
    """Refuse layouts that transformers' own code cannot run, or runs without some of the weights."""
    if config.new_decoder_architecture and not config.parallel_attn:
        raise ConversionError("parallel_attn=False is not supported with new_decoder_architecture; supported: True")
    norms = config.num_ln_in_parallel_attn
    allowed = (1, 2, None) if config.new_decoder_architecture else (1, None)
    if norms not in allowed:
        supported = ", ".join(str(number) for number in allowed if number)
        raise ConversionError(
            f"num_ln_in_parallel_attn={norms} is not supported with "
            f"new_decoder_architecture={bool(config.new_decoder_architecture)}; supported: {supported}"
        )
    heads, kv_heads = config.num_attention_heads, config.num_kv_heads
    if not config.new_decoder_architecture and not config.multi_query and kv_heads != heads:
        raise ConversionError(
            f"num_kv_heads={kv_heads} is not supported without new_decoder_architecture or multi_query; supported: "
            f"{heads}, which is num_attention_heads"
        )


def _num_kv_heads(config: Any) -> int:
    """Return the number of key heads. 7B's layout ignores the field, whose value is the number of query heads there."""
    if config.multi_query and not config.new_decoder_architecture:
        return 1
    quotient(config, "num_attention_heads", "num_kv_heads")
    return config.num_kv_heads


def _num_norms(config: Any) -> int:
    return config.num_ln_in_parallel_attn or (2 if config.new_decoder_architecture else 1)


def _rope(config: Any, head_dim: int) -> RotaryConfig:
    return rotary(config.rope_parameters, head_dim, config.max_position_embeddings)


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `transformer.` is the base model's prefix."""
    native, theirs = "blocks.{n}", "transformer.h.{n}"
    attention, mlp, bias = f"{theirs}.self_attention", f"{theirs}.mlp", config.qkv_bias
    # with one group both layouts are the same, but only the first can be divided by query head
    layout = "([n|k|k] d)" if config.num_kv_heads == 1 else "(k [g|1|1] d)"
    return [
        Row(EMBEDDING, ("transformer.word_embeddings.weight",), copy("v e"), "v"),
        *_norms(config, native, theirs),
        *fused_qkv(f"{native}.attention.qkv", f"{attention}.query_key_value", layout, bias=bias),
        *linear(f"{native}.attention.out", f"{attention}.dense", "h (n d)", "n", bias=bias),
        *linear(f"{native}.mlp.up", f"{mlp}.dense_h_to_4h", "f h", "f", bias=bias),
        *linear(f"{native}.mlp.down", f"{mlp}.dense_4h_to_h", "h f", "f", bias=bias),
        *norm("exit.norm", "transformer.ln_f", config.norm),
        Row(HEAD, ("lm_head.weight",), copy("v e"), "v"),
    ]


def _norms(config: DecoderConfig, native: str, theirs: str) -> list[Row]:
    if config.shared_norm:
        return norm(f"{native}.attention_norm", f"{theirs}.input_layernorm", config.norm)
    names = ("ln_attn", "ln_mlp") if config.parallel else ("input_layernorm", "post_attention_layernorm")
    first = norm(f"{native}.attention_norm", f"{theirs}.{names[0]}", config.norm)
    return first + norm(f"{native}.mlp_norm", f"{theirs}.{names[1]}", config.norm)


FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    prefix="transformer.",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    ignored=(r"^(transformer\.)?h\.\d+\.self_attention\.(rotary_emb|maybe_rotary)\.inv_freq$",),
    reference_attention="sdpa",  # transformers 5.23 adds ALiBi twice in "eager": to the scores, and in the mask
)

FAMILIES = (FALCON,)
