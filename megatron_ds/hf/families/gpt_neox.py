"""GPT-NeoX and Pythia: attention and MLP in parallel, each with its norm; fused Q, K and V grouped by head."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation, quotient, rotary
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, fused_qkv, linear, norm
from megatron_ds.hf.tensor_mapping import copy
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(
    mapped=frozenset(
        [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "hidden_act",
            "attention_dropout",
            "hidden_dropout",
            "max_position_embeddings",
            "initializer_range",
            "layer_norm_eps",
            "tie_word_embeddings",
            "use_parallel_residual",
            "attention_bias",
            "rope_parameters",
            "rope_scaling",
            "rope_theta",
            "partial_rotary_factor",
            "rotary_emb_base",
            "rotary_pct",
        ]
    ),
    cosmetic=frozenset({"pad_token_id"}),
)


def translate(config: Any) -> DecoderConfig:
    """Translate a GPTNeoXConfig."""
    head_dim = quotient(config, "hidden_size", "num_attention_heads")
    rope = rotary(config.rope_parameters, head_dim, config.max_position_embeddings, partial=True)
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        ffn_size=config.intermediate_size,
        norm=NormStyle("layer", config.layer_norm_eps),
        embedding_size=config.hidden_size,
        rotary=(rope,) * config.num_hidden_layers,
        parallel=config.use_parallel_residual,
        qkv_bias=config.attention_bias,
        attention_out_bias=config.attention_bias,
        mlp_bias=True,
        activation=activation("hidden_act", config.hidden_act),
        tied=config.tie_word_embeddings,
        embedding_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        residual_dropout=config.hidden_dropout,
        init_std=config.initializer_range,
    )


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `gpt_neox.` is the base model's prefix; the head is `embed_out` on disk."""
    native, theirs = "blocks.{n}", "gpt_neox.layers.{n}"
    attention, mlp, bias = f"{theirs}.attention", f"{theirs}.mlp", config.qkv_bias
    return [
        Row(EMBEDDING, ("gpt_neox.embed_in.weight",), copy("v e"), "v"),
        *norm(f"{native}.attention_norm", f"{theirs}.input_layernorm", config.norm),
        *fused_qkv(f"{native}.attention.qkv", f"{attention}.query_key_value", "(k [1|1|1] d)", bias=bias),
        *linear(f"{native}.attention.out", f"{attention}.dense", "h (n d)", "n", bias=config.attention_out_bias),
        *norm(f"{native}.mlp_norm", f"{theirs}.post_attention_layernorm", config.norm),
        *linear(f"{native}.mlp.up", f"{mlp}.dense_h_to_4h", "f h", "f", bias=True),
        *linear(f"{native}.mlp.down", f"{mlp}.dense_4h_to_h", "h f", "f", bias=True),
        *norm("exit.norm", "gpt_neox.final_layer_norm", config.norm),
        Row(HEAD, ("embed_out.weight",), copy("v e"), "v"),
    ]


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    ignored=(r"^(gpt_neox\.)?layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$",),
    old_rope_names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
)

FAMILIES = (GPT_NEOX,)
