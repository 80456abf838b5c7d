"""Granite's mixtures of experts, with shared experts or without: Granite's multipliers, fused tensors of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.families.experts import (
    AUX_LOSS,
    MLP,
    ROUTING,
    aux_loss,
    eager_experts,
    fused_rows,
    router,
    with_experts,
)
from megatron_ds.hf.families.llama import (
    MULTIPLIERS,
    RMS_FIELDS,
    THEIRS,
    attention_rows,
    biases,
    decoder,
    family,
    fused_gated_rows,
    multipliers,
    outer_rows,
    rms,
)
from megatron_ds.hf.family import Family, Row
from megatron_ds.hf.tensor_mapping import copy
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.stack import MoEConfig

EXPERTS = f"{THEIRS}.block_sparse_moe"
ON_DISK = ("router.layer.weight", "input_linear.weight", "output_linear.weight")
IN_MEMORY = ("router.weight", "experts.gate_up_proj", "experts.down_proj")
SHARED = f"{THEIRS}.shared_mlp"
_FIELDS = RMS_FIELDS | ROUTING | AUX_LOSS | MULTIPLIERS | {"attention_bias", "num_local_experts"}


def _decoder(config: Any, shared_ffn_size: int = 0) -> DecoderConfig:
    moe = MoEConfig(
        router=router(config, "num_local_experts", score="softmax_of_chosen"),
        ffn_size=config.intermediate_size,
        layers=tuple(range(config.num_hidden_layers)),
        shared_ffn_size=shared_ffn_size,
        aux_loss=aux_loss(config),
    )
    return with_experts(decoder(config, rms(config), **multipliers(config), **biases(config)), moe)


def rows(config: DecoderConfig, names: tuple[str, str, str] = ON_DISK) -> list[Row]:
    """Return the table. `model.` is the base model's prefix.

    Args:
        config: the model.
        names: of the router and the experts: on disk, or in memory.
    """
    assert config.moe is not None, config
    router_name, gate_up, down = (f"{EXPERTS}.{name}" for name in names)
    table = [
        *outer_rows(config),
        *attention_rows(config),
        Row(f"{MLP}.router.weight", (router_name,), copy("x h")),
        *fused_rows(gate_up, down),
    ]
    if config.moe.shared_ffn_size:
        table += fused_gated_rows(f"{MLP}.shared", f"{SHARED}.input_linear", f"{SHARED}.output_linear", "u")
    return table


def _family(model_type: str, architecture: str, shared: str | None, fields: FieldRules) -> Family:
    """Return a family of Granite; `shared` is the field with the width of the shared experts."""

    def translate(config: Any) -> DecoderConfig:
        return _decoder(config, getattr(config, shared) if shared is not None else 0)

    made = family(model_type, architecture, translate, fields, rows)
    return replace(made, other_rows=(lambda config: rows(config, IN_MEMORY),), load_options=eager_experts)


GRANITEMOE = _family("granitemoe", "GraniteMoeForCausalLM", None, FieldRules(_FIELDS))
GRANITEMOESHARED = _family(
    "granitemoeshared",
    "GraniteMoeSharedForCausalLM",
    "shared_intermediate_size",
    FieldRules(_FIELDS | {"shared_intermediate_size"}, may_be_zero=frozenset({"shared_intermediate_size"})),
)

FAMILIES = (GRANITEMOE, GRANITEMOESHARED)
