"""From what a model is to its stages."""

from __future__ import annotations

from collections.abc import Callable

from megatron_ds.models.bert import encoder_layers
from megatron_ds.models.config import DecoderConfig, EncoderConfig, ModelConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.gpt import decoder_layers
from megatron_ds.models.sequential import LayerSpec
from megatron_ds.models.t5 import encoder_decoder_layers

ChangeLayers = Callable[[list[LayerSpec], BuildContext], list[LayerSpec]]
"""(a model's own layers, build context) -> the layers to train."""


def own_layers(layers: list[LayerSpec], ctx: BuildContext) -> list[LayerSpec]:
    """Return a model's own layers."""
    return layers


def model_layers(config: ModelConfig, ctx: BuildContext | None = None) -> list[LayerSpec]:
    """The stages of any model, unbuilt."""
    if isinstance(config, DecoderConfig):
        return decoder_layers(config, ctx)
    if isinstance(config, EncoderConfig):
        return encoder_layers(config, ctx)
    return encoder_decoder_layers(config, ctx)
