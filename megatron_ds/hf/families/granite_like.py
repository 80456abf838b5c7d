"""Relatives of Granite: HyperCLOVA X, with norms around, and Granite 4 as far as all its layers are attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import every_rope
from megatron_ds.hf.families.llama import (
    MULTIPLIERS,
    NATIVE,
    RMS_FIELDS,
    THEIRS,
    attention_rows,
    biases,
    decoder,
    fused_gated_rows,
    multipliers,
    outer_rows,
    rms,
    rows,
)
from megatron_ds.hf.families.llama_like import later_family
from megatron_ds.hf.family import Row, renamed
from megatron_ds.models.gpt import DecoderConfig


def _hyperclovax(config: Any) -> DecoderConfig:
    """Logits are multiplied by `logits_scaling`, by which Granite divides them."""
    options = {**multipliers(config), "logit_multiplier": config.logits_scaling}
    place = "both" if config.use_post_norm else "input"
    return decoder(config, rms(config), norm_place=place, **options, **biases(config, mlp=True))


def _hyperclovax_rows(config: DecoderConfig) -> list[Row]:
    """`post_attention_layernorm` is the MLP's input norm in both places."""
    names = {
        "post_attention_layernorm": "post_norm1",
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "post_norm2",
    }
    return (renamed(rows, names) if config.norm_place == "both" else rows)(config)


def _granitemoehybrid(config: Any) -> DecoderConfig:
    for layer, kind in enumerate(config.layer_types):
        if kind != "full_attention":
            kind = {"linear_attention": "mamba"}.get(kind, kind)  # renamed by transformers 5
            raise ConversionError(f"layer_types[{layer}]={kind!r} is not supported; supported: 'attention'")
    if config.num_local_experts:
        raise ConversionError(f"num_local_experts={config.num_local_experts} is not supported; supported: 0")
    if config.position_embedding_type not in ("rope", "nope", None):
        raise ConversionError(
            f"position_embedding_type={config.position_embedding_type!r} is not supported; supported: rope, nope, null"
        )
    ropes = every_rope(config) if config.position_embedding_type == "rope" else ()
    return decoder(
        config,
        rms(config),
        ffn_size=config.shared_intermediate_size,
        rotary=ropes,
        **multipliers(config),
        **biases(config),
    )


def _granitemoehybrid_rows(config: DecoderConfig) -> list[Row]:
    gate_up, down = (f"{THEIRS}.shared_mlp.{name}_linear" for name in ("input", "output"))
    return [*outer_rows(config), *attention_rows(config), *fused_gated_rows(f"{NATIVE}.mlp", gate_up, down)]


HYPERCLOVAX = later_family(
    "hyperclovax",
    "HyperCLOVAXForCausalLM",
    _hyperclovax,
    FieldRules(RMS_FIELDS | MULTIPLIERS | {"attention_bias", "mlp_bias", "use_post_norm"}),
    _hyperclovax_rows,
)
_OF_MAMBA = ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand", "chunk_size", "conv_bias", "proj_bias")
_OF_EXPERTS = frozenset({"num_experts_per_tok", "output_router_logits", "router_aux_loss_coef", "intermediate_size"})
_FIELDS = FieldRules(
    RMS_FIELDS - {"intermediate_size"}
    | MULTIPLIERS
    | {"attention_bias", "shared_intermediate_size", "layer_types", "layers_block_type"}
    | {"num_local_experts", "position_embedding_type"},
    equal={"normalization_function": ("rmsnorm",)},
    cosmetic=_OF_EXPERTS | {f"mamba_{name}" for name in _OF_MAMBA} | {"time_step_limit", "init_method"},
    may_be_zero=frozenset({"num_local_experts", "num_experts_per_tok"}),
)
GRANITEMOEHYBRID = replace(
    later_family("granitemoehybrid", "GraniteMoeHybridForCausalLM", _granitemoehybrid, _FIELDS, _granitemoehybrid_rows),
    # as on the hub: "full_attention" is known to transformers 5 alone, which reads both
    config_overrides=lambda config: {"layer_types": ["attention"] * config.num_layers},
)

FAMILIES = (HYPERCLOVAX, GRANITEMOEHYBRID)
