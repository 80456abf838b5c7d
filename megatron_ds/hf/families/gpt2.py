"""GPT-2: learned positions, LayerNorm, Conv1D weights ([in, out]) and Q|K|V in blocks."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation, quotient
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, fused_qkv, linear, norm
from megatron_ds.hf.tensor_mapping import Op, copy
from megatron_ds.layers.embedding import PositionTable
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(
    mapped=frozenset(
        [
            "vocab_size",
            "n_positions",
            "n_embd",
            "n_layer",
            "n_head",
            "hidden_size",
            "max_position_embeddings",
            "num_hidden_layers",
            "num_attention_heads",
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
    training=frozenset({"summary_first_dropout"}),
    cosmetic=frozenset(
        [
            "pad_token_id",
            "n_ctx",
            "predict_special_tokens",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
        ]
    ),
)


def translate(config: Any) -> DecoderConfig:
    """Translate a GPT2Config."""
    return decoder(
        config,
        head_dim=quotient(config, "n_embd", "n_head"),
        ffn_size=config.n_inner or 4 * config.n_embd,
        attention_scale=None if config.scale_attn_weights else 1.0,
        scale_by_layer=config.scale_attn_by_inverse_layer_idx,
        scaled_residual_init=True,
        **dropouts(config),
    )


def dropouts(config: Any) -> dict[str, float]:
    """Translate GPT-2's dropouts."""
    return {
        "embedding_dropout": config.embd_pdrop,
        "attention_dropout": config.attn_pdrop,
        "residual_dropout": config.resid_pdrop,
    }


def decoder(config: Any, **options: Any) -> DecoderConfig:
    """Translate the fields that families with GPT-2's block share, by the names that all their configs know.

    Args:
        config: transformers' config object.
        options: of `DecoderConfig`, from the family's other fields.
    """
    shared: dict[str, Any] = {
        "family": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_attention_heads,
        "norm": NormStyle("layer", config.layer_norm_epsilon),
        "embedding_size": config.hidden_size,
        "positions": PositionTable(config.max_position_embeddings),
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "activation": activation("activation_function", config.activation_function),
        "tied": config.tie_word_embeddings,
        "init_std": config.initializer_range,
    }
    return DecoderConfig(**{**shared, **options})


NATIVE, THEIRS = "blocks.{n}", "transformer.h.{n}"


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `transformer.` is the base model's prefix."""
    attention, mlp = f"{THEIRS}.attn", f"{THEIRS}.mlp"
    return [
        *_outer_rows(config),
        *fused_qkv(f"{NATIVE}.attention.qkv", f"{attention}.c_attn", "([n|k|k] d)", bias=True, inputs_first=True),
        Row(f"{NATIVE}.attention.out.weight", (f"{attention}.c_proj.weight",), Op(("(n d) h",), "h (n d)"), "n"),
        Row(f"{NATIVE}.attention.out.bias", (f"{attention}.c_proj.bias",), copy("h")),
        Row(f"{NATIVE}.mlp.up.weight", (f"{mlp}.c_fc.weight",), Op(("h f",), "f h"), "f"),
        Row(f"{NATIVE}.mlp.up.bias", (f"{mlp}.c_fc.bias",), copy("f"), "f"),
        Row(f"{NATIVE}.mlp.down.weight", (f"{mlp}.c_proj.weight",), Op(("f h",), "h f"), "f"),
        Row(f"{NATIVE}.mlp.down.bias", (f"{mlp}.c_proj.bias",), copy("h")),
    ]


def _outer_rows(config: DecoderConfig) -> list[Row]:
    """Return the rows of the embeddings, the norms and the head."""
    return [
        Row(EMBEDDING, ("transformer.wte.weight",), copy("v e"), "v"),
        Row("entry.positions.weight", ("transformer.wpe.weight",), copy("p h")),
        *norm(f"{NATIVE}.attention_norm", f"{THEIRS}.ln_1", config.norm),
        *norm(f"{NATIVE}.mlp_norm", f"{THEIRS}.ln_2", config.norm),
        *norm("exit.norm", "transformer.ln_f", config.norm),
        Row(HEAD, ("lm_head.weight",), copy("v e"), "v"),
    ]


def linear_rows(config: DecoderConfig) -> list[Row]:
    """Return all rows but those of attention, of families that store weights as [out, in]."""
    return [
        *_outer_rows(config),
        *linear(f"{NATIVE}.mlp.up", f"{THEIRS}.mlp.c_fc", "f h", "f", bias=config.mlp_bias),
        *linear(f"{NATIVE}.mlp.down", f"{THEIRS}.mlp.c_proj", "h f", "f", bias=config.mlp_bias),
    ]


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    ignored=(r"^(transformer\.)?h\.\d+\.attn\.(masked_)?bias$",),
)

FAMILIES = (GPT2,)
