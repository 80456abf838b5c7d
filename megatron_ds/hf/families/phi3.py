"""Phi-3 and Phi-4-mini: Llama with fused projections, Q|K|V and gate|up in blocks, and a part of each head rotated."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import rotary
from megatron_ds.hf.families.llama import NATIVE, RMS_FIELDS, THEIRS, decoder, family, one_window, outer_rows
from megatron_ds.hf.family import Row, fused_qkv, linear
from megatron_ds.hf.tensor_mapping import FusedPiece, Op
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(
    mapped=RMS_FIELDS | {"original_max_position_embeddings", "sliding_window", "resid_pdrop"},
    equal={
        "embd_pdrop": (0.0,),  # transformers 5 does not apply it, transformers 4 does
        "attention_bias": (False,),
    },
)
GATE_UP = "([f|f]) h"


def translate(config: Any) -> DecoderConfig:
    """Translate a Phi3Config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = rotary(config.rope_parameters, head_dim, config.max_position_embeddings, partial=True)
    return decoder(
        config,
        NormStyle("rms", config.rms_norm_eps),
        rotary=(rope,) * config.num_hidden_layers,
        windows=one_window(config),
        residual_dropout=config.resid_pdrop,
    )


def rows(config: DecoderConfig) -> list[Row]:
    """Return the table. `model.` is the base model's prefix."""
    attention, gate_up = f"{THEIRS}.self_attn", f"{THEIRS}.mlp.gate_up_proj.weight"
    return [
        *outer_rows(config),
        *fused_qkv(f"{NATIVE}.attention.qkv", f"{attention}.qkv_proj", "([n|k|k] d)", bias=False),
        *linear(f"{NATIVE}.attention.out", f"{attention}.o_proj", "h (n d)", "n"),
        Row(
            f"{NATIVE}.mlp.up.weight",
            (gate_up,) * 2,
            Op((FusedPiece(GATE_UP, 0), FusedPiece(GATE_UP, 1)), "* f h"),
            "f",
        ),
        *linear(f"{NATIVE}.mlp.down", f"{THEIRS}.mlp.down_proj", "h f", "f"),
    ]


PHI3 = family("phi3", "Phi3ForCausalLM", translate, FIELDS, rows)

FAMILIES = (PHI3,)
