"""Qwen2-MoE, Qwen3-MoE and OLMoE: softmax routers, experts in some or all layers; Qwen2's shared expert has a gate."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import layer_windows
from megatron_ds.hf.families.experts import AUX_LOSS, ROUTING, ExpertNames, aux_loss, moe_family, router, with_experts
from megatron_ds.hf.families.llama import RMS_FIELDS, biases, decoder, one_window, rms
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.stack import MoEConfig

NAMES = ExpertNames(shared="mlp.shared_expert")
COUNTS = ("num_experts", "num_local_experts")
_FIELDS = RMS_FIELDS | ROUTING | AUX_LOSS | {"num_experts", "norm_topk_prob"}
_SPARSE = frozenset({"moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"})
_WINDOW = frozenset({"sliding_window", "use_sliding_window"})


def _sparse_layers(config: Any) -> tuple[int, ...]:
    """Return the layers with experts."""
    dense, step = config.mlp_only_layers, config.decoder_sparse_step
    return tuple(layer for layer in range(config.num_hidden_layers) if layer not in dense and (layer + 1) % step == 0)


def _moe(config: Any, ffn_size: int, layers: tuple[int, ...], **options: Any) -> MoEConfig:
    return MoEConfig(
        router=router(config, "num_experts", renormalise=config.norm_topk_prob),
        ffn_size=ffn_size,
        layers=layers,
        aux_loss=aux_loss(config),
        **options,
    )


def _qwen2_moe(config: Any) -> DecoderConfig:
    windows = layer_windows(config.layer_types, config.sliding_window or None)
    dense = decoder(config, rms(config), windows=windows, qkv_bias=config.qkv_bias)
    shared = {"shared_ffn_size": config.shared_expert_intermediate_size, "shared_gate": True}
    return with_experts(dense, _moe(config, config.moe_intermediate_size, _sparse_layers(config), **shared))


def _qwen3_moe(config: Any) -> DecoderConfig:
    dense = decoder(config, rms(config), windows=one_window(config), qk_norm=rms(config), **biases(config))
    return with_experts(dense, _moe(config, config.moe_intermediate_size, _sparse_layers(config)))


def _olmoe(config: Any) -> DecoderConfig:
    dense = decoder(config, rms(config), qk_norm=rms(config), qk_norm_across_heads=True, **biases(config))
    return with_experts(dense, _moe(config, config.intermediate_size, tuple(range(config.num_hidden_layers))))


QWEN2_MOE = moe_family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _qwen2_moe,
    FieldRules(
        _FIELDS
        | _SPARSE
        | _WINDOW
        | {"shared_expert_intermediate_size", "qkv_bias", "layer_types", "max_window_layers"},
        may_be_zero=frozenset({"sliding_window"}),  # transformers writes 0 without windows
    ),
    NAMES,
)
QWEN3_MOE = moe_family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _qwen3_moe,
    FieldRules(
        _FIELDS | _SPARSE | _WINDOW | {"num_local_experts", "attention_bias"},
        cosmetic=frozenset({"max_window_layers"}),  # its windows are in all layers or in none
    ),
    NAMES,
    counts=COUNTS,
)
OLMOE = moe_family(
    "olmoe",
    "OlmoeForCausalLM",
    _olmoe,
    FieldRules(_FIELDS | {"num_local_experts", "attention_bias"}, equal={"clip_qkv": (None,)}),
    NAMES,
    counts=COUNTS,
)

FAMILIES = (QWEN2_MOE, QWEN3_MOE, OLMOE)
