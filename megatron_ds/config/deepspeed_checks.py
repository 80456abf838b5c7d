"""Rules that a DeepSpeed JSON and the rest of a run must keep, beyond what the JSON's own keys allow."""

from collections.abc import Mapping
from typing import Any

from megatron_ds.config.engine_config import EngineConfig
from megatron_ds.config.run_config import CheckpointSection, TrainSection
from megatron_ds.errors import ConfigError


def check_recomputation(
    config: EngineConfig, mapping: Mapping[str, Any], *, trains_part: bool, encoder_decoder: str
) -> None:
    """Check a DeepSpeed JSON's `activation_checkpointing` and `pipeline` sections against `train.recompute`.

    Args:
        config: the engine's settings.
        mapping: the DeepSpeed JSON, unfilled.
        trains_part: whether adapters are trained, or parameters are frozen.
        encoder_decoder: the model type of an encoder-decoder; empty for other models.

    Raises:
        ConfigError: the two contradict each other, or cannot work with this model.
    """
    section = mapping.get("activation_checkpointing") or {}
    if section and config.recompute != "none" and trains_part:
        raise ConfigError(
            "deepspeed.activation_checkpointing does not recompute a layer whose input needs no gradient, such as the "
            f"one after a frozen embedding; remove it, so that train.recompute={config.recompute} uses torch's own"
        )
    if section.get("partition_activations") and encoder_decoder:
        raise ConfigError(
            "deepspeed.activation_checkpointing.partition_activations=true frees the inputs of a layer, and all "
            f"decoder layers of a {encoder_decoder} read the same encoder states; try false"
        )
    for key in ("cpu_checkpointing", "contiguous_memory_optimization"):
        if section.get(key) and not section.get("partition_activations"):
            raise ConfigError(
                f"deepspeed.activation_checkpointing.{key}=true works on partitioned activations only; try "
                f"partition_activations=true"
            )
    if section.get("contiguous_memory_optimization") and not section.get("number_checkpoints"):
        raise ConfigError(
            "deepspeed.activation_checkpointing.contiguous_memory_optimization=true needs number_checkpoints; try the "
            "number of layers"
        )
    if section.get("partition_activations") and config.recompute == "selective":
        raise ConfigError(
            "deepspeed.activation_checkpointing.partition_activations=true splits tensors that all tensor ranks hold; "
            "train.recompute=selective keeps each rank's own heads; try train.recompute=full"
        )
    if section.get("partition_activations") and config.parallel.sequence and config.parallel.tensor > 1:
        raise ConfigError(
            "deepspeed.activation_checkpointing.partition_activations=true splits tensors that all tensor ranks hold; "
            "with parallel.sequence=true they hold different parts already; set one of them to false"
        )
    if (mapping.get("pipeline") or {}).get("activation_checkpoint_interval"):
        raise ConfigError(
            "deepspeed.pipeline.activation_checkpoint_interval would recompute a second time what train.recompute "
            "does; remove it and set train.recompute=full"
        )


def check_saving(checkpoint: CheckpointSection, train: TrainSection, mapping: Mapping[str, Any]) -> None:
    """Check that nothing needs state in memory that the DeepSpeed JSON keeps on NVMe.

    Raises:
        ConfigError: the run saves checkpoints, averages its weights or compares replicas, and the state is on NVMe.
    """
    zero = mapping.get("zero_optimization") or {}
    for key in ("offload_optimizer", "offload_param"):
        on_nvme = f"deepspeed.zero_optimization.{key}.device=nvme"
        if (zero.get(key) or {}).get("device") == "nvme":
            if checkpoint.every:
                raise ConfigError(f"{on_nvme} cannot be saved yet; try cpu, or checkpoint.every=0")
            if train.ema is not None:
                raise ConfigError(f"{on_nvme} cannot be averaged by train.ema yet; try cpu, or no train.ema")
            if train.check_replicas:
                raise ConfigError(f"{on_nvme} cannot be compared yet; try cpu, or train.check_replicas=0")


def check_repeats(train: TrainSection, zero_stage: int) -> None:
    """Check that a micro-batch can be computed twice.

    Raises:
        ConfigError: ZeRO-3 divides the weights.
    """
    if train.check_repeats and zero_stage == 3:
        raise ConfigError(
            f"train.check_repeats={train.check_repeats} cannot compute with weights that ZeRO-3 divides; try ZeRO "
            "stage 2, or train.check_repeats=0"
        )


def check_state_in_memory(optimizer: str, mapping: Mapping[str, Any]) -> None:
    """Check that the DeepSpeed JSON does not keep the state of an optimizer on NVMe that must be in memory.

    Raises:
        ConfigError: it does.
    """
    zero = mapping.get("zero_optimization") or {}
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        raise ConfigError(
            "deepspeed.zero_optimization.offload_optimizer.device=nvme has not been tried with "
            f"optimizer.name={optimizer}, whose ranks exchange state; try cpu, or optimizer.name=adamw"
        )
