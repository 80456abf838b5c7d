"""Families that use Llama's names. They share one table, which depends on the options of the translated config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import (
    activation,
    every_rope,
    head_size,
    layer_windows,
    padding_id,
    quotient,
)
from megatron_ds.hf.family import EMBEDDING, HEAD, Family, Row, fused_gated, linear, norm, separate_qkv
from megatron_ds.hf.tensor_mapping import Op, copy
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

NATIVE, THEIRS = "blocks.{n}", "model.layers.{n}"
BUFFERS = (r"^(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$",)

# Names of a block's norms by their place: `post_attention_layernorm` is before the MLP in some families, and at the end
# of attention in others.
NORM_NAMES = {
    "input": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "output": {
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
    "both": {
        "attention_norm": "input_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
}


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `model.` is the base model's prefix."""
    mlp = gated_rows(f"{NATIVE}.mlp", f"{THEIRS}.mlp", bias=config.mlp_bias) if config.gated else _plain_mlp(config)
    return [*outer_rows(config), *attention_rows(config), *mlp]


def attention_rows(config: DecoderConfig) -> list[Row]:
    """Return the rows of attention."""
    q, k, v, o = (f"{THEIRS}.self_attn.{part}_proj" for part in "qkvo")
    return [
        *separate_qkv(f"{NATIVE}.attention.qkv", q, k, v, bias=config.qkv_bias),
        *_qk_norms(config),
        *linear(f"{NATIVE}.attention.out", o, "h (n d)", "n", bias=config.attention_out_bias),
    ]


def outer_rows(config: DecoderConfig) -> list[Row]:
    """Return the rows of the embedding, the norms of hidden states, and the head."""
    table = [Row(EMBEDDING, ("model.embed_tokens.weight",), copy("v e"), "v")]
    for native, theirs in NORM_NAMES[config.norm_place].items():
        if native == "mlp_norm" and config.shared_norm:
            continue
        table += norm(f"{NATIVE}.{native}", f"{THEIRS}.{theirs}", config.norm)
    table += norm("exit.norm", "model.norm", config.norm)
    return [*table, Row(HEAD, ("lm_head.weight",), copy("v e"), "v")]


def head_bias() -> list[Row]:
    """Return the row of the bias of the logits."""
    return [Row("head.bias", ("lm_head.bias",), copy("v"), "v")]


def _qk_norms(config: DecoderConfig) -> list[Row]:
    style, table = config.qk_norm, list[Row]()
    if style is None:
        return table
    for part, heads in (("q", "n"), ("k", "k")):
        native, theirs = f"{NATIVE}.attention.{part}_norm", f"{THEIRS}.self_attn.{part}_norm"
        pattern = f"({heads} d)" if config.qk_norm_across_heads else f"{heads} d"
        if config.qk_norm_across_heads or config.qk_norm_each_head:
            table.append(Row(f"{native}.weight", (f"{theirs}.weight",), copy(pattern), heads))
        else:
            table += norm(native, theirs, style, "d")
    return table


def gated_rows(native: str, theirs: str, width: str = "f", *, bias: bool = False) -> list[Row]:
    """Return the rows of a gated feed-forward layer from three projections.

    Args:
        native, theirs: names of the layer.
        width: the axis of its inner features.
        bias: whether the projections have biases.
    """
    gate, up, down = (f"{theirs}.{part}_proj" for part in ("gate", "up", "down"))
    weights, op = (f"{gate}.weight", f"{up}.weight"), Op((f"{width} h",) * 2, f"* {width} h")
    table = [Row(f"{native}.up.weight", weights, op, width)]
    if bias:
        biases, op = (f"{gate}.bias", f"{up}.bias"), Op((width,) * 2, f"* {width}")
        table.append(Row(f"{native}.up.bias", biases, op, width))
    return table + linear(f"{native}.down", down, f"h {width}", width, bias=bias)


def fused_gated_rows(native: str, gate_up: str, down: str, width: str = "f") -> list[Row]:
    """Return the rows of a gated feed-forward layer with one tensor of gates and ups, one block after the other.

    Args:
        native: name of the layer.
        gate_up, down: names of the projections.
        width: the axis of its inner features.
    """
    return [*fused_gated(f"{native}.up", gate_up, width), *linear(f"{native}.down", down, f"h {width}", width)]


def _plain_mlp(config: DecoderConfig) -> list[Row]:
    return [
        *linear(f"{NATIVE}.mlp.up", f"{THEIRS}.mlp.c_fc", "f h", "f", bias=config.mlp_bias),
        *linear(f"{NATIVE}.mlp.down", f"{THEIRS}.mlp.c_proj", "h f", "f", bias=config.mlp_bias),
    ]


# ---- configs ---------------------------------------------------------------------------------------------------------

ROPE_FIELDS = frozenset({"rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"})
SHARED_FIELDS = ROPE_FIELDS | {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "attention_dropout",
    "pad_token_id",
}
RMS_FIELDS = SHARED_FIELDS | {"rms_norm_eps", "hidden_act"}
MULTIPLIERS = frozenset({"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"})
SLIDING_FIELDS = frozenset({"sliding_window", "use_sliding_window", "layer_types"})


def decoder(config: Any, norm_style: NormStyle, act: str = "hidden_act", **options: Any) -> DecoderConfig:
    """Translate the fields that all these families share.

    Args:
        config: transformers' config object.
        norm_style: of hidden states.
        act: name of the field with the activation.
        options: of `DecoderConfig`, from the family's other fields.
    """
    quotient(config, "num_attention_heads", "num_key_value_heads")
    if "activation" not in options:
        options["activation"] = activation(act, getattr(config, act))
    if "attention_dropout" not in options:
        options["attention_dropout"] = config.attention_dropout or 0.0
    if "ffn_size" not in options:
        options["ffn_size"] = config.intermediate_size
    if "rotary" not in options:
        options["rotary"] = every_rope(config)
    shared: dict[str, Any] = {
        "family": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_size(config),
        "norm": norm_style,
        "embedding_size": config.hidden_size,
        "padding_id": padding_id(config),
        "gated": True,
        "tied": config.tie_word_embeddings,
        "init_std": config.initializer_range,
    }
    return DecoderConfig(**{**shared, **options})


def one_window(config: Any) -> tuple[int | None, ...]:
    """Return the same window for all layers."""
    return (config.sliding_window,) * config.num_hidden_layers


def rms(config: Any, **options: bool) -> NormStyle:
    """Translate `rms_norm_eps`; the options are those of `NormStyle`."""
    return NormStyle("rms", config.rms_norm_eps, **options)


def biases(config: Any, *, mlp: bool = False) -> dict[str, Any]:
    """Translate `attention_bias` for all projections, and `mlp_bias` in families that have it."""
    bias = config.attention_bias
    return {"qkv_bias": bias, "attention_out_bias": bias, "mlp_bias": config.mlp_bias if mlp else False}


def translate_llama(config: Any) -> DecoderConfig:
    """Translate a LlamaConfig."""
    return decoder(config, rms(config), **biases(config, mlp=True))


def _mistral(config: Any) -> DecoderConfig:
    return decoder(config, rms(config), windows=one_window(config))


def _qwen2(config: Any) -> DecoderConfig:
    windows = layer_windows(config.layer_types, config.sliding_window)
    return decoder(config, rms(config), windows=windows, qkv_bias=True)


def _qwen3(config: Any) -> DecoderConfig:
    windows = layer_windows(config.layer_types, config.sliding_window)
    return decoder(config, rms(config), windows=windows, qk_norm=rms(config), **biases(config))


def _olmo2(config: Any) -> DecoderConfig:
    style = rms(config, fp32_weight=True)
    return decoder(config, style, norm_place="output", qk_norm=style, qk_norm_across_heads=True, **biases(config))


def multipliers(config: Any) -> dict[str, Any]:
    """Translate Granite's multipliers.

    Raises:
        ConversionError: one is null, which transformers admits in a config and cannot compute with.
    """
    for name in sorted(MULTIPLIERS):
        if getattr(config, name) is None:
            raise ConversionError(f"{name}=None must be a number; nearest: 1.0")
    return {
        "embedding_multiplier": config.embedding_multiplier,
        "attention_scale": config.attention_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logit_multiplier": 1.0 / config.logits_scaling,
    }


def _granite(config: Any) -> DecoderConfig:
    return decoder(config, rms(config), **multipliers(config), **biases(config, mlp=True))


def _smollm3(config: Any) -> DecoderConfig:
    window = config.sliding_window if config.use_sliding_window else None
    windows = layer_windows(config.layer_types, window)
    rotating = config.no_rope_layers
    if len(rotating) != config.num_hidden_layers or not set(rotating) <= {0, 1}:
        raise ConversionError(f"no_rope_layers={rotating!r} must hold a 0 or a 1 for each layer")
    everywhere = decoder(config, rms(config), windows=windows, **biases(config, mlp=True))
    return replace(everywhere, rotary=tuple(rope if on else None for rope, on in zip(everywhere.rotary, rotating)))


def family(
    model_type: str,
    architecture: str,
    translate: Callable[[Any], DecoderConfig],
    fields: FieldRules,
    table: Callable[[DecoderConfig], list[Row]] = rows,
) -> Family:
    """Return a family with Llama's prefix and buffers."""
    return Family(model_type, architecture, "model.", fields, translate, table, BUFFERS)


LLAMA = family("llama", "LlamaForCausalLM", translate_llama, FieldRules(RMS_FIELDS | {"attention_bias", "mlp_bias"}))
MISTRAL = family("mistral", "MistralForCausalLM", _mistral, FieldRules(RMS_FIELDS | {"sliding_window"}))
QWEN2 = family("qwen2", "Qwen2ForCausalLM", _qwen2, FieldRules(RMS_FIELDS | SLIDING_FIELDS | {"max_window_layers"}))
QWEN3 = family(
    "qwen3",
    "Qwen3ForCausalLM",
    _qwen3,
    FieldRules(RMS_FIELDS | SLIDING_FIELDS | {"max_window_layers", "attention_bias"}),
)
OLMO2 = family("olmo2", "Olmo2ForCausalLM", _olmo2, FieldRules(RMS_FIELDS | {"attention_bias"}))
GRANITE = family(
    "granite",
    "GraniteForCausalLM",
    _granite,
    FieldRules(RMS_FIELDS | MULTIPLIERS | {"attention_bias", "mlp_bias"}),
)
SMOLLM3 = family(
    "smollm3",
    "SmolLM3ForCausalLM",
    _smollm3,
    FieldRules(
        RMS_FIELDS | SLIDING_FIELDS | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
        cosmetic=frozenset({"max_window_layers"}),
    ),
)

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2, GRANITE, SMOLLM3)
