"""GPT-J and CodeGen: attention and MLP in parallel after one norm, adjacent dims rotated in pairs, a head with a bias.

CodeGen's queries, values and keys are one tensor of four blocks of heads, the parts of four devices in its training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation, quotient
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, linear, norm, separate_qkv
from megatron_ds.hf.tensor_mapping import FusedPiece, Op, copy
from megatron_ds.layers.norm import NormStyle
from megatron_ds.layers.rotary import RotaryConfig
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(
    mapped=frozenset(
        [
            "vocab_size",
            "n_embd",
            "n_layer",
            "n_head",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "n_inner",
            "rotary_dim",
            "activation_function",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "layer_norm_epsilon",
            "initializer_range",
            "tie_word_embeddings",
        ]
    ),
    equal={
        "rotary": (True,),
        "scale_attn_weights": (True,),
    },
    training=frozenset({"summary_first_dropout"}),
    cosmetic=frozenset(
        [
            "pad_token_id",
            "n_positions",  # how far transformers makes its table of angles
            "max_position_embeddings",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
        ]
    ),
)


def translate(config: Any) -> DecoderConfig:
    """Translate a GPTJConfig or a CodeGenConfig."""
    head_dim, rotated = quotient(config, "n_embd", "n_head"), config.rotary_dim
    if rotated is None or rotated % 2 or rotated > head_dim:
        raise ConversionError(f"rotary_dim={rotated} must be even and at most n_embd / n_head = {head_dim}")
    return DecoderConfig(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=head_dim,
        ffn_size=config.n_inner or 4 * config.n_embd,
        norm=NormStyle("layer", config.layer_norm_epsilon),
        embedding_size=config.n_embd,
        rotary=(RotaryConfig(rotated, adjacent=True),) * config.n_layer,
        parallel=True,
        shared_norm=True,
        mlp_bias=True,
        activation=activation("activation_function", config.activation_function),
        head_bias=True,
        tied=config.tie_word_embeddings,
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
        init_std=config.initializer_range,
    )


NATIVE, THEIRS = "blocks.{n}", "transformer.h.{n}"


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `transformer.` is the base model's prefix."""
    q, k, v = (f"{THEIRS}.attn.{part}_proj" for part in "qkv")
    return [*_other_rows(config), *separate_qkv(f"{NATIVE}.attention.qkv", q, k, v, bias=False)]


def _other_rows(config: DecoderConfig) -> list[Row]:
    """Return all rows but those of queries, keys and values."""
    return [
        Row(EMBEDDING, ("transformer.wte.weight",), copy("v e"), "v"),
        *norm(f"{NATIVE}.attention_norm", f"{THEIRS}.ln_1", config.norm),
        *linear(f"{NATIVE}.attention.out", f"{THEIRS}.attn.out_proj", "h (n d)", "n"),
        *linear(f"{NATIVE}.mlp.up", f"{THEIRS}.mlp.fc_in", "f h", "f", bias=True),
        *linear(f"{NATIVE}.mlp.down", f"{THEIRS}.mlp.fc_out", "h f", "f", bias=True),
        *norm("exit.norm", "transformer.ln_f", config.norm),
        Row(HEAD, ("lm_head.weight",), copy("v e"), "v"),
        Row("head.bias", ("lm_head.bias",), copy("v"), "v"),
    ]


GPTJ = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    prefix="transformer.",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    ignored=(r"^(transformer\.)?h\.\d+\.attn\.((masked_)?bias|embed_positions)$",),
)

CODEGEN_QKV = "(j [l|l|l] d) h"  # for each of four blocks j: queries, values and keys of its l heads


def _codegen(config: Any) -> DecoderConfig:
    if config.n_head % 4:
        raise ConversionError(f"n_head={config.n_head} must be a multiple of 4; nearest: {-(-config.n_head // 4) * 4}")
    return translate(config)


def _codegen_rows(config: DecoderConfig) -> list[Row]:
    fused, native = f"{THEIRS}.attn.qkv_proj.weight", f"{NATIVE}.attention.qkv"
    queries, values, keys = (FusedPiece(CODEGEN_QKV, piece) for piece in range(3))
    return [
        *_other_rows(config),
        Row(f"{native}.q_weight", (fused,), Op((queries,), "(j l d) h"), "j"),
        Row(f"{native}.kv_weight", (fused, fused), Op((keys, values), "(j l * d) h"), "j"),
    ]


CODEGEN = replace(
    GPTJ,
    model_type="codegen",
    architecture="CodeGenForCausalLM",
    fields=FieldRules(
        FIELDS.mapped,
        equal={"scale_attn_weights": (True,)},
        training=FIELDS.training,
        cosmetic=FIELDS.cosmetic | {"n_ctx"},
    ),
    translate=_codegen,
    rows=_codegen_rows,
    ignored=(r"^(transformer\.)?h\.\d+\.attn\.(causal_mask|embed_positions)$",),
)

FAMILIES = (GPTJ, CODEGEN)
