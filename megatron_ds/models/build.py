"""From what a model is to its stages."""

from __future__ import annotations

from megatron_ds.models.bert import encoder_stages
from megatron_ds.models.block import Placement
from megatron_ds.models.config import DecoderConfig, EncoderConfig, ModelConfig
from megatron_ds.models.gpt import decoder_stages
from megatron_ds.models.stages import StageSpec
from megatron_ds.models.t5 import encoder_decoder_stages


def model_stages(config: ModelConfig, at: Placement | None = None) -> list[StageSpec]:
    """The stages of any model, unbuilt."""
    if isinstance(config, DecoderConfig):
        return decoder_stages(config, at)
    if isinstance(config, EncoderConfig):
        return encoder_stages(config, at)
    return encoder_decoder_stages(config, at)
