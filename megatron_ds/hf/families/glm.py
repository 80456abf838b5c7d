"""GLM-4: Llama with a part of each head rotated in adjacent pairs, and fused gates and ups; 0414: norms around too."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import every_rope
from megatron_ds.hf.families.llama import (
    NATIVE,
    RMS_FIELDS,
    THEIRS,
    attention_rows,
    decoder,
    fused_gated_rows,
    outer_rows,
    rms,
)
from megatron_ds.hf.families.llama_like import later_family
from megatron_ds.hf.family import Row, renamed
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(RMS_FIELDS | {"attention_bias"})


def _decoder(config: Any, norm_place: str) -> DecoderConfig:
    ropes = every_rope(config, partial=True, adjacent=True)
    return decoder(config, rms(config), norm_place=norm_place, rotary=ropes, qkv_bias=config.attention_bias)


def _glm(config: Any) -> DecoderConfig:
    return _decoder(config, "input")


def _glm4(config: Any) -> DecoderConfig:
    return _decoder(config, "both")


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `model.` is the base model's prefix."""
    gate_up, down = (f"{THEIRS}.mlp.{name}_proj" for name in ("gate_up", "down"))
    return [*outer_rows(config), *attention_rows(config), *fused_gated_rows(f"{NATIVE}.mlp", gate_up, down)]


# `post_attention_layernorm` is the MLP's input norm, and not, as in Gemma 2, at the end of attention.
NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}

GLM = later_family("glm", "GlmForCausalLM", _glm, FIELDS, rows)
GLM4 = later_family("glm4", "Glm4ForCausalLM", _glm4, FIELDS, renamed(rows, NORMS))

FAMILIES = (GLM, GLM4)
