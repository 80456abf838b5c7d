"""GPT-2: learned positions, LayerNorm, Conv1D weights ([in, out]) and Q|K|V in blocks."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, fused_qkv
from megatron_ds.hf.fields import FieldRules
from megatron_ds.hf.mapping import Op, copy
from megatron_ds.hf.translate import activation
from megatron_ds.layers.embedding import PositionTable
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.config import DecoderConfig

FIELDS = FieldRules(
    mapped=frozenset(
        [
            "vocab_size",
            "n_positions",
            "n_embd",
            "n_layer",
            "n_head",
            "n_inner",
            "activation_function",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "layer_norm_epsilon",
            "initializer_range",
            "tie_word_embeddings",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
        ]
    ),
    equal={
        "reorder_and_upcast_attn": (False,),
        "n_special": (0,),
    },
    harmless=frozenset(
        [
            "n_ctx",
            "predict_special_tokens",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        ]
    ),
)


def translate(config: Any) -> DecoderConfig:
    """GPT2Config -> DecoderConfig."""
    return DecoderConfig(
        family="gpt2",
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        ffn_size=config.n_inner or 4 * config.n_embd,
        norm=NormStyle("layer", config.layer_norm_epsilon),
        embedding_size=config.n_embd,
        positions=PositionTable(config.n_positions),
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        attention_scale=None if config.scale_attn_weights else 1.0,
        scale_by_layer=config.scale_attn_by_inverse_layer_idx,
        activation=activation("activation_function", config.activation_function),
        tied=config.tie_word_embeddings,
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
        init_std=config.initializer_range,
        scaled_residual_init=True,
    )


QKV = "([k|k|k] d)"


def rows(config: DecoderConfig) -> list[Row]:
    """The table. `transformer.` is the base model's prefix."""
    native, theirs = "blocks.{n}", "transformer.h.{n}"
    qkv = f"{theirs}.attn.c_attn"
    table = [
        Row(EMBEDDING, ("transformer.wte.weight",), copy("v e"), "v"),
        Row("entry.positions.weight", ("transformer.wpe.weight",), copy("p h")),
        Row(f"{native}.attention.out.weight", (f"{theirs}.attn.c_proj.weight",), Op(("(k d) h",), "h (k d)"), "k"),
        Row(f"{native}.attention.out.bias", (f"{theirs}.attn.c_proj.bias",), copy("h")),
        Row(f"{native}.mlp.up.weight", (f"{theirs}.mlp.c_fc.weight",), Op(("h f",), "f h"), "f"),
        Row(f"{native}.mlp.up.bias", (f"{theirs}.mlp.c_fc.bias",), copy("f"), "f"),
        Row(f"{native}.mlp.down.weight", (f"{theirs}.mlp.c_proj.weight",), Op(("f h",), "h f"), "f"),
        Row(f"{native}.mlp.down.bias", (f"{theirs}.mlp.c_proj.bias",), copy("h")),
        Row(HEAD, ("lm_head.weight",), copy("v e"), "v"),
        *fused_qkv(f"{native}.attention.qkv", qkv, "weight", f"h {QKV}", q="(k d) h", kv="(k * d) h"),
        *fused_qkv(f"{native}.attention.qkv", qkv, "bias", QKV, q="(k d)", kv="(k * d)"),
    ]
    for ours, name in (
        (f"{native}.attention_norm", f"{theirs}.ln_1"),
        (f"{native}.mlp_norm", f"{theirs}.ln_2"),
        ("exit.norm", "transformer.ln_f"),
    ):
        table += [Row(f"{ours}.{part}", (f"{name}.{part}",), copy("h")) for part in ("weight", "bias")]
    return table


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    ignored=(r"(^|\.)attn\.(bias|masked_bias)$",),
)
