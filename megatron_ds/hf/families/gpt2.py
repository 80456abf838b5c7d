"""GPT-2: learned positions, LayerNorm, Conv1D weights ([in, out]) and Q|K|V in blocks."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row
from megatron_ds.hf.fields import FieldRules
from megatron_ds.hf.mapping import Op, copy
from megatron_ds.hf.translate import activation
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
        ]
    ),
    equal={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
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
        max_positions=config.n_positions,
        rotary=None,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        activation=activation("activation_function", config.activation_function),
        gated=False,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tied=config.tie_word_embeddings,
        windows=(None,) * config.n_layer,
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        residual_dropout=config.resid_pdrop,
        init_std=config.initializer_range,
        scaled_residual_init=True,
    )


def rows(config: DecoderConfig) -> list[Row]:
    """The table. `transformer.` is the base model's prefix."""
    native, theirs = "blocks.{n}", "transformer.h.{n}"
    table = [
        Row(EMBEDDING, ("transformer.wte.weight",), copy("v h"), "v"),
        Row("positions.table.weight", ("transformer.wpe.weight",), copy("p h")),
        Row(f"{native}.attention.qkv.weight", (f"{theirs}.attn.c_attn.weight",), Op(("h (c k d)",), "(k c d) h"), "k"),
        Row(f"{native}.attention.qkv.bias", (f"{theirs}.attn.c_attn.bias",), Op(("(c k d)",), "(k c d)"), "k"),
        Row(f"{native}.attention.out.weight", (f"{theirs}.attn.c_proj.weight",), Op(("(k d) h",), "h (k d)"), "k"),
        Row(f"{native}.attention.out.bias", (f"{theirs}.attn.c_proj.bias",), copy("h")),
        Row(f"{native}.mlp.up.weight", (f"{theirs}.mlp.c_fc.weight",), Op(("h f",), "f h"), "f"),
        Row(f"{native}.mlp.up.bias", (f"{theirs}.mlp.c_fc.bias",), copy("f"), "f"),
        Row(f"{native}.mlp.down.weight", (f"{theirs}.mlp.c_proj.weight",), Op(("f h",), "h f"), "f"),
        Row(f"{native}.mlp.down.bias", (f"{theirs}.mlp.c_proj.bias",), copy("h")),
        Row(HEAD, ("lm_head.weight",), copy("v h"), "v"),
    ]
    for ours, name in (
        (f"{native}.attention_norm", f"{theirs}.ln_1"),
        (f"{native}.mlp_norm", f"{theirs}.ln_2"),
        ("final_norm", "transformer.ln_f"),
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
