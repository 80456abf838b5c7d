"""StableLM 3B and 2: Llama's names with LayerNorms and a part of each head rotated; 12B's blocks are parallel."""

from __future__ import annotations

from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import every_rope, quotient
from megatron_ds.hf.families.llama import NATIVE, SHARED_FIELDS, THEIRS, decoder, family, rows
from megatron_ds.hf.family import Row
from megatron_ds.hf.spread_mapping import Spread
from megatron_ds.hf.tensor_mapping import copy
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(
    SHARED_FIELDS
    | {"hidden_act", "layer_norm_eps", "use_qkv_bias", "use_parallel_residual", "qk_layernorm", "hidden_dropout"}
)


def translate(config: Any) -> DecoderConfig:
    """Translate a StableLmConfig."""
    head_dim, given = quotient(config, "hidden_size", "num_attention_heads"), getattr(config, "head_dim", None)
    if given not in (None, head_dim):
        raise ConversionError(f"head_dim={given} is not supported; supported: {head_dim}, hidden_size / heads")
    norm_each = NormStyle("layer", config.layer_norm_eps, bias=False) if config.qk_layernorm else None
    return decoder(
        config,
        NormStyle("layer", config.layer_norm_eps),
        rotary=every_rope(config, partial=True),
        parallel=config.use_parallel_residual,
        shared_norm=config.use_parallel_residual,
        qkv_bias=config.use_qkv_bias,
        qk_norm=norm_each,
        qk_norm_each_head=norm_each is not None,
        residual_dropout=config.hidden_dropout,
        attention_out_dropout=0.0,  # the MLP's output alone has dropout
    )


def _rows(config: DecoderConfig) -> list[Row]:
    """Return Llama's table; the norm of each head is a tensor by itself."""
    found = []
    for row in rows(config):
        part = row.native.removeprefix(f"{NATIVE}.attention.").removesuffix("_norm.weight")
        if config.qk_norm_each_head and part in ("q", "k"):
            axis, heads = ("n", config.num_heads) if part == "q" else ("k", config.num_kv_heads)
            names = (f"{THEIRS}.self_attn.{part}_layernorm.norms.{head}.weight" for head in range(heads))
            row = Row(row.native, tuple(names), Spread(copy("d"), axis, heads), axis)
        found.append(row)
    return found


STABLELM = family("stablelm", "StableLmForCausalLM", translate, FIELDS, _rows)

FAMILIES = (STABLELM,)
