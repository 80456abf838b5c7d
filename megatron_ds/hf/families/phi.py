"""Phi 1, 1.5 and 2: attention and MLP in parallel after one LayerNorm, a part of each head rotated, a head with a bias.

The modules of their authors' own code ("phi-msft") have other names and are not read.
"""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import every_rope
from megatron_ds.hf.families.llama import SHARED_FIELDS, decoder, family, head_bias, rows
from megatron_ds.hf.family import Row, renamed
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

NAMES = {
    "self_attn.o_proj": "self_attn.dense",
    "self_attn.q_norm": "self_attn.q_layernorm",
    "self_attn.k_norm": "self_attn.k_layernorm",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "model.norm": "model.final_layernorm",
}
FIELDS = FieldRules(SHARED_FIELDS | {"hidden_act", "layer_norm_eps", "resid_pdrop", "embd_pdrop", "qk_layernorm"})


def translate(config: Any) -> DecoderConfig:
    """Translate a PhiConfig."""
    style = NormStyle("layer", config.layer_norm_eps)
    return decoder(
        config,
        style,
        rotary=every_rope(config, partial=True),
        gated=False,
        parallel=True,
        shared_norm=True,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        head_bias=True,
        qk_norm=style if config.qk_layernorm else None,
        residual_dropout=config.resid_pdrop,
        embedding_dropout=config.embd_pdrop,
    )


def _rows(config: DecoderConfig) -> list[Row]:
    return [*renamed(rows, NAMES)(config), *head_bias()]


PHI = family("phi", "PhiForCausalLM", translate, FIELDS, _rows)

FAMILIES = (PHI,)
