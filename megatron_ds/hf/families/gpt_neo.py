"""GPT-Neo: GPT-2 with separate projections, scores that are not scaled, and a window in every other layer."""

from __future__ import annotations

from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import quotient
from megatron_ds.hf.families import gpt2
from megatron_ds.hf.family import Family, Row, linear, separate_qkv
from megatron_ds.models.gpt import DecoderConfig

_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_position_embeddings")
_ATTENTION = ("num_hidden_layers", "num_attention_heads", "attention_types", "attention_layers", "window_size")
_DROPOUTS = ("resid_dropout", "embed_dropout", "attention_dropout")
FIELDS = FieldRules(
    mapped=frozenset({*_SIZES, *_ATTENTION, *_DROPOUTS, "activation_function", "layer_norm_epsilon"})
    | {"initializer_range", "tie_word_embeddings"},
    training=gpt2.FIELDS.training,
    cosmetic=gpt2.FIELDS.cosmetic - {"n_ctx", "predict_special_tokens"},
)


def translate(config: Any) -> DecoderConfig:
    """Translate a GPTNeoConfig."""
    for layer, kind in enumerate(config.attention_layers):
        if kind not in ("global", "local"):
            raise ConversionError(f"attention_layers[{layer}]={kind!r} is not supported; supported: global, local")
    return gpt2.decoder(
        config,
        head_dim=quotient(config, "hidden_size", "num_heads"),
        ffn_size=config.intermediate_size or 4 * config.hidden_size,
        qkv_bias=False,
        attention_scale=1.0,
        windows=tuple(config.window_size if kind == "local" else None for kind in config.attention_layers),
        embedding_dropout=config.embed_dropout,
        attention_dropout=config.attention_dropout,
        residual_dropout=config.resid_dropout,
    )


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `transformer.` is the base model's prefix."""
    q, k, v, out = (f"{gpt2.THEIRS}.attn.attention.{part}_proj" for part in ("q", "k", "v", "out"))
    return [
        *gpt2.linear_rows(config),
        *separate_qkv(f"{gpt2.NATIVE}.attention.qkv", q, k, v, bias=False),
        *linear(f"{gpt2.NATIVE}.attention.out", out, "h (n d)", "n", bias=True),
    ]


GPT_NEO = Family(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    prefix="transformer.",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    ignored=(r"^(transformer\.)?h\.\d+\.attn\.attention\.(masked_)?bias$",),
)

FAMILIES = (GPT_NEO,)
