"""GLM-4.5, dots.llm1 and ERNIE 4.5: routers whose choice has a bias, first layers without experts, shared experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import every_rope, layer_windows
from megatron_ds.hf.families.experts import (
    AUX_LOSS,
    ROUTING,
    ExpertNames,
    aux_loss,
    group_options,
    moe_family,
    router,
    with_experts,
)
from megatron_ds.hf.families.llama import RMS_FIELDS, biases, decoder, rms
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.stack import MoEConfig

NAMES = ExpertNames()
ERNIE_IN_MEMORY = replace(NAMES, choice_bias=("mlp.gate.moe_statics.e_score_correction_bias", "1 x"))
ERNIE_NAMES = replace(NAMES, choice_bias=("mlp.moe_statics.e_score_correction_bias", "1 x"))
GROUPED = (
    RMS_FIELDS
    | ROUTING
    | {
        "attention_bias",
        "moe_intermediate_size",
        "n_routed_experts",
        "num_local_experts",
        "n_shared_experts",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "first_k_dense_replace",
    }
)
_LEAST_SUM = 1e-20  # added by transformers to a sum of weights


def _grouped(config: Any) -> MoEConfig:
    """Translate DeepSeek-V3's router, with sigmoid scores and groups, and its shared experts."""
    choice = router(
        config,
        "n_routed_experts",
        score="sigmoid",
        renormalise=bool(config.norm_topk_prob),
        least_sum=_LEAST_SUM,
        scale=config.routed_scaling_factor,
        choice_bias=True,
        fp32=True,
        **group_options(config, "n_routed_experts"),
    )
    if config.n_shared_experts is None:
        raise ConversionError("n_shared_experts=None is not supported: transformers needs a number; nearest: 1")
    return MoEConfig(
        router=choice,
        ffn_size=config.moe_intermediate_size,
        layers=tuple(range(config.first_k_dense_replace, config.num_hidden_layers)),
        shared_ffn_size=config.moe_intermediate_size * config.n_shared_experts,
    )


def _glm4_moe(config: Any) -> DecoderConfig:
    dense = decoder(
        config,
        rms(config),
        rotary=every_rope(config, partial=True),
        qkv_bias=config.attention_bias,
        qk_norm=rms(config) if config.use_qk_norm else None,
    )
    return with_experts(dense, _grouped(config))


def _dots1(config: Any) -> DecoderConfig:
    windows = layer_windows(config.layer_types, config.sliding_window)
    return with_experts(
        decoder(config, rms(config), windows=windows, qk_norm=rms(config), **biases(config)), _grouped(config)
    )


def _ernie(config: Any) -> DecoderConfig:
    ropes = every_rope(config, adjacent=True, fp32=True)
    first, last, step = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
    moe = MoEConfig(
        router=router(config, "moe_num_experts", "moe_k", choice_bias=True, least_sum=config.moe_norm_min, fp32=True),
        ffn_size=config.moe_intermediate_size,
        layers=tuple(
            layer for layer in range(config.num_hidden_layers) if first <= layer <= last and (layer + 1) % step == 0
        ),
        shared_ffn_size=config.moe_intermediate_size * config.moe_num_shared_experts,
        aux_loss=aux_loss(config),
    )
    dense = decoder(config, rms(config), rotary=ropes, attention_dropout=0.0)
    return with_experts(dense, moe)


def _further_layers(config: Any) -> tuple[str, ...]:
    """Layers after the last one predict further tokens."""
    first, count = config.num_hidden_layers, config.num_nextn_predict_layers or 0
    return tuple(rf"^(model\.)?layers\.{layer}\." for layer in range(first, first + count))


_GLM4_MOE = moe_family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    _glm4_moe,
    FieldRules(
        GROUPED | {"use_qk_norm"},
        training=frozenset({"output_router_logits"}),
        cosmetic=frozenset({"num_nextn_predict_layers", "num_mtp_layers"}),
        may_be_zero=frozenset({"first_k_dense_replace"}),
    ),
    NAMES,
)
GLM4_MOE = replace(
    _GLM4_MOE,
    further_modules=_further_layers,
    config_overrides=lambda config: {"num_nextn_predict_layers": 0},
)
DOTS1 = moe_family(
    "dots1",
    "Dots1ForCausalLM",
    _dots1,
    FieldRules(
        GROUPED | {"sliding_window", "max_window_layers", "layer_types"},
        # fields of its authors' own code, which transformers' code takes for granted
        equal={"scoring_func": ("noaux_tc", "sigmoid"), "moe_layer_freq": (1,)},
        training=frozenset({"output_router_logits"}),
        may_be_zero=frozenset({"first_k_dense_replace"}),
    ),
    NAMES,
)
_ERNIE4_5_MOE = moe_family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    _ernie,
    FieldRules(
        RMS_FIELDS - {"attention_dropout"}
        | ROUTING
        | AUX_LOSS
        | {
            "moe_k",
            "moe_num_experts",
            "num_experts",
            "moe_num_shared_experts",
            "moe_intermediate_size",
            "moe_layer_start_index",
            "moe_layer_end_index",
            "moe_layer_interval",
            "moe_norm_min",
        },
        equal={"use_bias": (False,)},
        may_be_zero=frozenset({"moe_num_shared_experts", "moe_layer_start_index"}),
    ),
    ERNIE_NAMES,
    ERNIE_IN_MEMORY,
)
ERNIE4_5_MOE = replace(_ERNIE4_5_MOE, further_modules=lambda config: (r"^(model\.)?mtp_",))

FAMILIES = (GLM4_MOE, DOTS1, ERNIE4_5_MOE)
