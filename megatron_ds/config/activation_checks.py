"""Checks of the settings for the memory of activations against each other, the model and the DeepSpeed JSON."""

from collections.abc import Mapping
from typing import Any

from megatron_ds.config.engine_config import EngineConfig
from megatron_ds.errors import ConfigError


def check_activations(config: EngineConfig, mapping: Mapping[str, Any], *, has_dense_layers: bool) -> None:
    """Check `train.offload_activations`, `train.keep_attention` and `train.mlp_tile_tokens`.

    Args:
        config: the engine's settings.
        mapping: the DeepSpeed JSON, unfilled.
        has_dense_layers: whether the model has feed-forward layers other than mixtures of experts.

    Raises:
        ConfigError: a setting would do nothing, or the JSON decides the same.
    """
    if config.offload_activations and config.recompute != "full":
        raise ConfigError(
            f"train.offload_activations=true moves the inputs of recomputed blocks, and train.recompute="
            f"{config.recompute} has none; try train.recompute=full, or train.offload_activations=false"
        )
    if config.keep_attention and config.recompute != "full":
        raise ConfigError(
            f"train.keep_attention=true spares recomputed blocks their attention, and train.recompute="
            f"{config.recompute} has none; try train.recompute=full, or train.keep_attention=false"
        )
    if config.keep_attention and config.compile:
        raise ConfigError(
            "train.keep_attention=true keeps the results of single operators, which train.compile=true may fuse; try "
            "train.compile=false"
        )
    section = mapping.get("activation_checkpointing") or {}
    if config.keep_attention and section:
        raise ConfigError(
            f"train.keep_attention=true is of torch's checkpoints, and deepspeed.activation_checkpointing."
            f"{next(iter(section))} of DeepSpeed's; remove one of them"
        )
    if config.offload_activations and section:
        key = "cpu_checkpointing" if "cpu_checkpointing" in section else next(iter(section))
        raise ConfigError(
            f"train.offload_activations=true and deepspeed.activation_checkpointing.{key} both decide how the inputs "
            "of recomputed blocks are kept; remove one of them"
        )
    if config.mlp_tile_tokens is not None and not has_dense_layers:
        raise ConfigError(
            f"train.mlp_tile_tokens={config.mlp_tile_tokens} divides dense feed-forward layers, and all of this "
            "model's are mixtures of experts; remove it"
        )
