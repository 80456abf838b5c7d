"""Nemotron 4 and Minitron: LayerNorms whose factor is 1 + weight, a plain MLP of squared ReLUs, partial rotation."""

from __future__ import annotations

from typing import Any

from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import every_rope
from megatron_ds.hf.families.llama import SHARED_FIELDS, biases, decoder, family
from megatron_ds.hf.families.llama_like import plain_mlp_rows
from megatron_ds.layers.norm import NormStyle
from megatron_ds.models.gpt import DecoderConfig

FIELDS = FieldRules(SHARED_FIELDS | {"hidden_act", "norm_eps", "attention_bias", "mlp_bias"})


def translate(config: Any) -> DecoderConfig:
    """Translate a NemotronConfig."""
    return decoder(
        config,
        NormStyle("layer", config.norm_eps, one_plus=True),
        rotary=every_rope(config, partial=True),
        gated=False,
        **biases(config, mlp=True),
    )


NEMOTRON = family("nemotron", "NemotronForCausalLM", translate, FIELDS, plain_mlp_rows)

FAMILIES = (NEMOTRON,)
