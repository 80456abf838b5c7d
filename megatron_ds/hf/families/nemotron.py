"""Nemotron 4 and Minitron: LayerNorms whose factor is 1 + weight, a plain MLP of squared ReLUs, partial rotation."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import rotary
from megatron_ds.hf.families.llama import SHARED_FIELDS, biases, decoder, family, rows
from megatron_ds.hf.family import renamed
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(SHARED_FIELDS | {"hidden_act", "norm_eps", "attention_bias", "mlp_bias"})
PLAIN_MLP = {"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}


def translate(config: Any) -> DecoderConfig:
    """Translate a NemotronConfig."""
    rope = rotary(config.rope_parameters, config.head_dim, config.max_position_embeddings, partial=True)
    return decoder(
        config,
        NormStyle("layer", config.norm_eps, one_plus=True),
        rotary=(rope,) * config.num_hidden_layers,
        gated=False,
        **biases(config, mlp=True),
    )


NEMOTRON = family("nemotron", "NemotronForCausalLM", translate, FIELDS, renamed(rows, PLAIN_MLP))

FAMILIES = (NEMOTRON,)
