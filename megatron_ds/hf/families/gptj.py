"""GPT-J: attention and MLP in parallel after one norm, adjacent dims rotated in pairs, a head with a bias."""

from __future__ import annotations

from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation, quotient
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, linear, norm, separate_qkv
from megatron_ds.hf.tensor_mapping import copy
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
    """Translate a GPTJConfig."""
    head_dim, rotated = quotient(config, "n_embd", "n_head"), config.rotary_dim
    if rotated is None or rotated % 2 or rotated > head_dim:
        raise ConversionError(f"rotary_dim={rotated} must be even and at most n_embd / n_head = {head_dim}")
    return DecoderConfig(
        family="gptj",
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


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `transformer.` is the base model's prefix."""
    native, theirs = "blocks.{n}", "transformer.h.{n}"
    q, k, v, out = (f"{theirs}.attn.{part}_proj" for part in ("q", "k", "v", "out"))
    return [
        Row(EMBEDDING, ("transformer.wte.weight",), copy("v e"), "v"),
        *norm(f"{native}.attention_norm", f"{theirs}.ln_1", config.norm),
        *separate_qkv(f"{native}.attention.qkv", q, k, v, bias=False),
        *linear(f"{native}.attention.out", out, "h (n d)", "n"),
        *linear(f"{native}.mlp.up", f"{theirs}.mlp.fc_in", "f h", "f", bias=True),
        *linear(f"{native}.mlp.down", f"{theirs}.mlp.fc_out", "h f", "f", bias=True),
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

FAMILIES = (GPTJ,)
