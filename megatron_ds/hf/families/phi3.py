"""Phi-3 and Phi-4-mini: Llama with fused projections, Q|K|V and gate|up in blocks, and a part of each head rotated."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import every_rope
from megatron_ds.hf.families.llama import (
    NATIVE,
    RMS_FIELDS,
    THEIRS,
    decoder,
    family,
    fused_gated_rows,
    one_window,
    outer_rows,
)
from megatron_ds.hf.family import Row, fused_qkv, linear
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(
    mapped=RMS_FIELDS | {"original_max_position_embeddings", "sliding_window", "resid_pdrop"},
    equal={
        "embd_pdrop": (0.0,),  # transformers 5 does not apply it, transformers 4 does
        "attention_bias": (False,),
    },
)


def translate(config: Any) -> DecoderConfig:
    """Translate a Phi3Config."""
    return decoder(
        config,
        NormStyle("rms", config.rms_norm_eps),
        rotary=every_rope(config, partial=True),
        windows=one_window(config),
        residual_dropout=config.resid_pdrop,
    )


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `model.` is the base model's prefix."""
    attention, mlp = f"{THEIRS}.self_attn", f"{THEIRS}.mlp"
    return [
        *outer_rows(config),
        *fused_qkv(f"{NATIVE}.attention.qkv", f"{attention}.qkv_proj", "([n|k|k] d)", bias=False),
        *linear(f"{NATIVE}.attention.out", f"{attention}.o_proj", "h (n d)", "n"),
        *fused_gated_rows(f"{NATIVE}.mlp", f"{mlp}.gate_up_proj", f"{mlp}.down_proj"),
    ]


PHI3 = family("phi3", "Phi3ForCausalLM", translate, FIELDS, rows)

FAMILIES = (PHI3,)
