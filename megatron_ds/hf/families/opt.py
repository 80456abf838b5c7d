"""OPT: learned positions that skip padding, norms before (most sizes) or after (350M) the sum, a narrow embedding.

BioGPT has the same block under other names, and a scaled embedding.
"""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation, padding_id, quotient
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, linear, norm, renamed, separate_qkv
from megatron_ds.hf.tensor_mapping import copy
from megatron_ds.layers.embedding import PositionTable
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

EPS = 1e-5  # torch's default, which no config field changes
FIELDS = FieldRules(
    mapped=frozenset(
        [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "ffn_dim",
            "max_position_embeddings",
            "do_layer_norm_before",
            "_remove_final_layer_norm",
            "word_embed_proj_dim",
            "dropout",
            "attention_dropout",
            "num_attention_heads",
            "activation_function",
            "init_std",
            "enable_bias",
            "layer_norm_elementwise_affine",
            "tie_word_embeddings",
            "pad_token_id",
        ]
    ),
    equal={
        "layerdrop": (0.0,),
    },
)


def _decoder(config: Any, **options: Any) -> DecoderConfig:
    """Translate the fields that both families have.

    Args:
        config: transformers' config object.
        options: of `DecoderConfig`, from the family's other fields.
    """
    return DecoderConfig(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=quotient(config, "hidden_size", "num_attention_heads"),
        padding_id=padding_id(config),
        tied=config.tie_word_embeddings,
        **options,
    )


def translate(config: Any) -> DecoderConfig:
    """Translate an OPTConfig."""
    bias = config.enable_bias
    return _decoder(
        config,
        ffn_size=config.ffn_dim,
        norm=NormStyle("layer", EPS, affine=config.layer_norm_elementwise_affine),
        embedding_size=config.word_embed_proj_dim,
        positions=PositionTable(config.max_position_embeddings, offset=2, skips_padding=True),
        norm_place="input" if config.do_layer_norm_before else "sum",
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        activation=activation("activation_function", config.activation_function),
        final_norm=config.do_layer_norm_before and not config._remove_final_layer_norm,
        attention_dropout=config.attention_dropout,
        residual_dropout=config.dropout,
        init_std=config.init_std,
    )


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `model.` is the base model's prefix; the MLP's norm is named `final_layer_norm` too."""
    native, theirs = "blocks.{n}", "model.decoder.layers.{n}"
    q, k, v, out = (f"{theirs}.self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
    place = "norm" if config.norm_place == "input" else "output_norm"
    table = [
        Row(EMBEDDING, ("model.decoder.embed_tokens.weight",), copy("v e"), "v"),
        Row("entry.positions.weight", ("model.decoder.embed_positions.weight",), copy("p h")),
        *norm(f"{native}.attention_{place}", f"{theirs}.self_attn_layer_norm", config.norm),
        *separate_qkv(f"{native}.attention.qkv", q, k, v, bias=config.qkv_bias),
        *linear(f"{native}.attention.out", out, "h (n d)", "n", bias=config.attention_out_bias),
        *norm(f"{native}.mlp_{place}", f"{theirs}.final_layer_norm", config.norm),
        *linear(f"{native}.mlp.up", f"{theirs}.fc1", "f h", "f", bias=config.mlp_bias),
        *linear(f"{native}.mlp.down", f"{theirs}.fc2", "h f", "f", bias=config.mlp_bias),
        Row(HEAD, ("lm_head.weight",), copy("v e"), "v"),
    ]
    if config.embedding_size != config.hidden_size:
        table += linear("entry.projection", "model.decoder.project_in", "h e", None)
        table += linear("exit.projection", "model.decoder.project_out", "e h", None)
    if config.final_norm:
        table += norm("exit.norm", "model.decoder.final_layer_norm", config.norm)
    return table


OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    prefix="model.",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    ignored=(r"^(model\.)?decoder\.version$",),
)

BIOGPT_NAMES = {
    "model.decoder.embed_tokens": "biogpt.embed_tokens",
    "model.decoder.embed_positions": "biogpt.embed_positions",
    "model.decoder.layers": "biogpt.layers",
    "model.decoder.final_layer_norm": "biogpt.layer_norm",
    "lm_head": "output_projection",
}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_OTHERS = ("max_position_embeddings", "hidden_act", "scale_embedding", "initializer_range", "tie_word_embeddings")
BIOGPT_FIELDS = FieldRules(
    mapped=frozenset({*_SIZES, *_DROPOUTS, *_OTHERS, "pad_token_id"}),
    equal={"layerdrop": (0.0,), "activation_dropout": (0.0,)},
    cosmetic=frozenset({"layer_norm_eps"}),  # transformers' code does not read it: all norms have torch's default
)


def _biogpt(config: Any) -> DecoderConfig:
    return _decoder(
        config,
        ffn_size=config.intermediate_size,
        norm=NormStyle("layer", EPS),
        embedding_size=config.hidden_size,
        embedding_multiplier=config.hidden_size**0.5 if config.scale_embedding else 1.0,
        positions=PositionTable(config.max_position_embeddings, offset=2),  # transformers 4 skips padding in addition
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        activation=activation("hidden_act", config.hidden_act),
        embedding_dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        residual_dropout=config.hidden_dropout_prob,
        init_std=config.initializer_range,
    )


BIOGPT = Family(
    model_type="biogpt",
    architecture="BioGptForCausalLM",
    prefix="biogpt.",
    fields=BIOGPT_FIELDS,
    translate=_biogpt,
    rows=renamed(rows, BIOGPT_NAMES),
)

FAMILIES = (OPT, BIOGPT)
