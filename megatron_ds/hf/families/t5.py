"""T5: v1.0 (plain feed-forward, tied and scaled head), v1.1 and Flan (gated, untied head), and mT5, which is v1.1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import activation
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, linear, norm, separate_qkv
from megatron_ds.hf.tensor_mapping import Op, copy
from megatron_ds.layers.norm import NormStyle
from megatron_ds.layers.relative_bias import RelativePositions
from megatron_ds.models.stack import StackConfig
from megatron_ds.models.t5 import EncoderDecoderConfig

FIELDS = FieldRules(
    mapped=frozenset(
        [
            "vocab_size",
            "d_model",
            "d_kv",
            "d_ff",
            "num_layers",
            "num_decoder_layers",
            "num_heads",
            "hidden_size",
            "head_dim",
            "num_hidden_layers",
            "num_attention_heads",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
            "dropout_rate",
            "layer_norm_epsilon",
            "initializer_factor",
            "feed_forward_proj",
            "dense_act_fn",
            "is_gated_act",
            "scale_decoder_outputs",
            "tie_word_embeddings",
            "pad_token_id",
            "decoder_start_token_id",
        ]
    ),
    equal={"is_encoder_decoder": (True,), "is_decoder": (False,)},
    cosmetic=frozenset({"n_positions"}),
)


MT5_FIELDS = FieldRules(
    mapped=FIELDS.mapped - {"scale_decoder_outputs", "tie_word_embeddings"},
    equal=FIELDS.equal,
    cosmetic=frozenset({"tie_word_embeddings"}),  # transformers' class sets the latter to true
)


def translate(config: Any) -> EncoderDecoderConfig:
    """Translate a T5Config. Attention is not scaled; the head of v1.0 is, by d_model^-0.5."""
    return _translate(config, scaled=config.scale_decoder_outputs)


def translate_mt5(config: Any) -> EncoderDecoderConfig:
    """Translate an MT5Config, whose head is never scaled."""
    return _translate(config, scaled=False)


def _translate(config: Any, *, scaled: bool) -> EncoderDecoderConfig:
    padding = _id(config, "pad_token_id", 0)
    encoder = _stack(config)
    return EncoderDecoderConfig(
        family="t5",
        vocab_size=config.vocab_size,
        encoder=encoder,
        decoder=replace(encoder, num_layers=config.num_decoder_layers, causal=True, cross_attention=True),
        tied=scaled,  # for random weights; weights on disk decide otherwise
        logit_multiplier=config.d_model**-0.5 if scaled else 1.0,
        embedding_dropout=config.dropout_rate,
        embedding_std=config.initializer_factor,
        head_std=config.initializer_factor * config.d_model**-0.5,  # as in T5's training; transformers uses 1
        decoder_start_id=_id(config, "decoder_start_token_id", padding),
        padding_id=padding,
    )


def _stack(config: Any) -> StackConfig:
    factor, dropout = config.initializer_factor, config.dropout_rate
    return StackConfig(
        hidden_size=config.d_model,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.d_kv,
        ffn_size=config.d_ff,
        norm=NormStyle("rms", config.layer_norm_epsilon),
        causal=False,
        relative=_relative(config),
        attention_scale=1.0,
        activation=_activation(config),
        gated=config.is_gated_act,
        attention_dropout=dropout,
        residual_dropout=dropout,
        ffn_dropout=dropout,
        init_std=factor,
        fan_in_init=True,
    )


def _relative(config: Any) -> RelativePositions:
    buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if buckets < 4 or buckets % 2:
        raise ConversionError(
            f"relative_attention_num_buckets={buckets} must be an even number of at least 4; nearest: "
            f"{max(4, buckets - buckets % 2)}"
        )
    if distance <= buckets // 2:
        raise ConversionError(
            f"relative_attention_max_distance={distance} must be above half of relative_attention_num_buckets="
            f"{buckets}; nearest: {buckets // 2 + 1}"
        )
    return RelativePositions(buckets, distance, std=config.initializer_factor * config.d_model**-0.5)


def _activation(config: Any) -> str:
    """Translate feed_forward_proj; its parts are fields of their own in some versions and must not contradict it."""
    parts = config.feed_forward_proj.split("-")
    name = "gelu_new" if parts == ["gated", "gelu"] else parts[-1]
    for field, value in (("is_gated_act", parts[0] == "gated"), ("dense_act_fn", name)):
        if getattr(config, field) != value:
            raise ConversionError(
                f"{field}={getattr(config, field)!r} contradicts feed_forward_proj={config.feed_forward_proj!r}"
            )
    return activation("feed_forward_proj", name)


def _id(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < config.vocab_size:
        raise ConversionError(f"{name}={value!r} must be at least 0 and below vocab_size={config.vocab_size}")
    return int(value)


def rows(config: EncoderDecoderConfig) -> list[Row]:
    """Return the table. Both stacks share the embedding; each has one table of positions, in its first block."""
    return [
        Row(EMBEDDING, ("shared.weight",), copy("v e"), "v"),
        *_stack_rows("encoder", config.encoder),
        *_stack_rows("decoder", config.decoder),
        Row(HEAD, ("lm_head.weight",), copy("v e"), "v"),
    ]


def _stack_rows(stack: str, config: StackConfig) -> list[Row]:
    native, theirs = f"{stack}.blocks.{{n}}", f"{stack}.block.{{n}}"
    table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    found = [Row(f"{stack}.blocks.0.attention.relative.weight", (table,), copy("b n"), "n")]
    parts = [("attention", "SelfAttention")]
    if config.cross_attention:
        parts.append(("cross", "EncDecAttention"))
    for number, (ours, name) in enumerate(parts):
        place = f"{theirs}.layer.{number}"
        q, k, v, out = (f"{place}.{name}.{part}" for part in "qkvo")
        found += norm(f"{native}.{ours}_norm", f"{place}.layer_norm", config.norm)
        found += separate_qkv(f"{native}.{ours}.qkv", q, k, v, bias=False)
        found += linear(f"{native}.{ours}.out", out, "h (n d)", "n")
    place = f"{theirs}.layer.{len(parts)}"
    ffn = f"{place}.DenseReluDense"
    found += norm(f"{native}.mlp_norm", f"{place}.layer_norm", config.norm)
    if config.gated:
        names = (f"{ffn}.wi_0.weight", f"{ffn}.wi_1.weight")
        found.append(Row(f"{native}.mlp.up.weight", names, Op(("f h",) * 2, "* f h"), "f"))
    else:
        found += linear(f"{native}.mlp.up", f"{ffn}.wi", "f h", "f")
    found += linear(f"{native}.mlp.down", f"{ffn}.wo", "h f", "f")
    return found + norm(f"{stack}.exit.norm", f"{stack}.final_layer_norm", config.norm)


def config_overrides(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Return the fields that decide whether the head's input is scaled; the weights decide whether it is tied."""
    scaled = config.logit_multiplier != 1.0
    return {"tie_word_embeddings": scaled, "scale_decoder_outputs": scaled}


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    prefix="",
    fields=FIELDS,
    translate=translate,
    rows=rows,
    ignored=(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",),
    aliases={f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")},
    tied_by_bytes=True,
    config_overrides=config_overrides,
)
MT5 = replace(
    T5,
    model_type="mt5",
    same_as="t5",
    architecture="MT5ForConditionalGeneration",
    fields=MT5_FIELDS,
    translate=translate_mt5,
    config_overrides=lambda config: {"tie_word_embeddings": False},  # transformers 4 scales a head that is called tied
)

FAMILIES = (T5, MT5)
