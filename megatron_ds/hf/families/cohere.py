"""Command R, R+, R7B and A (Cohere): attention and MLP in parallel after one LayerNorm without bias, scaled logits."""

from __future__ import annotations

from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import every_rope, layer_windows
from megatron_ds.hf.families.llama import SHARED_FIELDS, biases, decoder, family
from megatron_ds.layers.norm import NormStyle
from megatron_ds.layers.rotary import RotaryConfig
from megatron_ds.models.gpt import DecoderConfig

_FIELDS = SHARED_FIELDS | {"hidden_act", "layer_norm_eps", "logit_scale", "attention_bias"}
_EQUAL: dict[str, tuple[Any, ...]] = {  # fields of its authors' own code, which transformers' code takes for granted
    "order_of_interleaved_layers": ("local_attn_first",),
    "position_embedding_type": ("rope_gptj",),
    "rotary_pct": (1.0,),
    "use_embedding_sharing": (True,),
    "use_gated_activation": (True,),
    "use_parallel_block": (True,),
    "use_qk_norm": (False,),
}


def _decoder(config: Any, **options: Any) -> DecoderConfig:
    if config.logit_scale is None:
        raise ConversionError("logit_scale=None is not supported: transformers needs a number; nearest: 1.0")
    return decoder(
        config,
        _style(config),
        parallel=True,
        shared_norm=True,
        logit_multiplier=config.logit_scale,
        **biases(config),
        **options,
    )


def _style(config: Any) -> NormStyle:
    return NormStyle("layer", config.layer_norm_eps, bias=False)


def _ropes(config: Any) -> tuple[RotaryConfig, ...]:
    return every_rope(config, adjacent=True, fp32=True, rounded=True)


def _cohere(config: Any) -> DecoderConfig:
    normed = {"qk_norm": _style(config), "qk_norm_each_head": True} if config.use_qk_norm else {}
    return _decoder(config, rotary=_ropes(config), **normed)


def _cohere2(config: Any) -> DecoderConfig:
    """Translate a Cohere2Config. Layers without a window do not rotate."""
    windows = layer_windows(config.layer_types, config.sliding_window)
    return _decoder(
        config, windows=windows, rotary=tuple(window and rope for window, rope in zip(windows, _ropes(config)))
    )


COHERE = family(
    "cohere",
    "CohereForCausalLM",
    _cohere,
    FieldRules(_FIELDS | {"use_qk_norm"}, cosmetic=frozenset({"model_max_length"})),
)
COHERE2 = family(
    "cohere2",
    "Cohere2ForCausalLM",
    _cohere2,
    FieldRules(
        _FIELDS | {"sliding_window", "sliding_window_pattern", "layer_types"},
        equal=_EQUAL,
        cosmetic=frozenset({"layer_switch", "use_parallel_embedding"}),  # the former is sliding_window_pattern
    ),
)

FAMILIES = (COHERE, COHERE2)
