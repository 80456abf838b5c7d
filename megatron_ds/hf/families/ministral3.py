"""Ministral 3, the text model of 2512: Mistral, whose queries grow with their position beyond the original length."""

from __future__ import annotations

from typing import Any

from megatron_ds.errors import ConversionError
from megatron_ds.hf.config_fields import FieldRules
from megatron_ds.hf.config_translation import rotary
from megatron_ds.hf.families.llama import RMS_FIELDS, decoder, family, one_window, rms
from megatron_ds.layers.attention_shape import QueryTemperature
from megatron_ds.models.gpt import DecoderConfig

BETA, LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"


def translate(config: Any) -> DecoderConfig:
    """Translate a Ministral3Config. The growth is among the fields of the rotation."""
    given = {name: value for name, value in config.rope_parameters.items() if name != "max_position_embeddings"}
    for name in (BETA, LENGTH):
        if given.get(name) is None:
            raise ConversionError(f"rope_parameters.{name} is missing, without which transformers' code fails")
    growth = QueryTemperature(float(given.pop(BETA)), given[LENGTH])
    if given.get("rope_type") == "default":
        del given[LENGTH]  # it is of the growth alone
    rope = rotary(given, config.head_dim, config.max_position_embeddings)
    return decoder(
        config,
        rms(config),
        rotary=(rope,) * config.num_hidden_layers,
        windows=one_window(config),
        query_temperature=growth if growth.beta else None,
    )


MINISTRAL3 = family("ministral3", "Ministral3ForCausalLM", translate, FieldRules(RMS_FIELDS | {"sliding_window"}))

FAMILIES = (MINISTRAL3,)
