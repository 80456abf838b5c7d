"""Gemma, VaultGemma, Gemma 2 and the text of Gemma 3: soft caps, windows in some layers, a scaled embedding."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import layer_windows, ropes_by_kind
from megatron_ds.hf.families.llama import RMS_FIELDS, SHARED_FIELDS, biases, decoder, family, rows
from megatron_ds.hf.families.llama_like import later_family
from megatron_ds.hf.family import renamed
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

_FIELDS = SHARED_FIELDS | {
    "rms_norm_eps",
    "hidden_activation",
    "attention_bias",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "final_logit_softcapping",
}
_EQUAL: dict[str, tuple[Any, ...]] = {"use_bidirectional_attention": (False, None)}


def _gemma(config: Any, act: str = "hidden_act", **options: Any) -> DecoderConfig:
    return decoder(
        config,
        _style(config),
        act=act,
        embedding_multiplier=config.hidden_size**0.5,
        embedding_multiplier_in_dtype=True,
        **biases(config),
        **options,
    )


def _decoder(config: Any, norm_place: str = "both", **options: Any) -> DecoderConfig:
    return _gemma(
        config,
        "hidden_activation",
        norm_place=norm_place,
        attention_scale=config.query_pre_attn_scalar**-0.5,
        windows=layer_windows(config.layer_types, config.sliding_window),
        logit_softcap=config.final_logit_softcapping,
        **options,
    )


def _style(config: Any) -> NormStyle:
    return NormStyle("rms", config.rms_norm_eps, one_plus=True, fp32_weight=True)


def _vaultgemma(config: Any) -> DecoderConfig:
    return _decoder(config, "input", attention_softcap=config.attn_logit_softcapping)


def _gemma2(config: Any) -> DecoderConfig:
    return _decoder(config, attention_softcap=config.attn_logit_softcapping)


def _gemma3(config: Any) -> DecoderConfig:
    return _decoder(config, qk_norm=_style(config), rotary=ropes_by_kind(config))


GEMMA = later_family(
    "gemma",
    "GemmaForCausalLM",
    _gemma,
    # hidden_activation is not read by transformers 5; transformers 4 preferred it to hidden_act
    FieldRules(RMS_FIELDS | {"attention_bias"}, equal=_EQUAL | {"hidden_activation": ("gelu_pytorch_tanh", None)}),
)
VAULTGEMMA = later_family(
    "vaultgemma",
    "VaultGemmaForCausalLM",
    _vaultgemma,
    FieldRules(_FIELDS | {"attn_logit_softcapping"}),
    renamed(rows, {"post_attention_layernorm": "pre_feedforward_layernorm"}),
)
GEMMA2 = family(
    "gemma2",
    "Gemma2ForCausalLM",
    _gemma2,
    FieldRules(
        _FIELDS | {"attn_logit_softcapping"},
        # an older name of hidden_activation, which transformers does not read
        equal=_EQUAL | {"hidden_act": ("gelu_pytorch_tanh",)},
        cosmetic=frozenset({"sliding_window_size"}),  # a second name of sliding_window, which is read
    ),
)
GEMMA3_TEXT = family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _gemma3,
    FieldRules(
        _FIELDS - {"partial_rotary_factor"} | {"rope_local_base_freq", "sliding_window_pattern"},
        # transformers caps the scores of Gemma 2 only, whatever this field says
        equal=_EQUAL | {"attn_logit_softcapping": (None,)},
        cosmetic=frozenset({"_sliding_window_pattern"}),
    ),
)

FAMILIES = (GEMMA, VAULTGEMMA, GEMMA2, GEMMA3_TEXT)
