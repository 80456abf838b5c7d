"""DeepSpeed as the engine: the only package that imports it for training.

An engine is built from one list of layers. With one pipeline stage the layers become a plain module (ZeRO 0 to 3,
offload); with several they become DeepSpeed's PipelineModule (1F1B, ZeRO-1). Both adapters have the interface `Engine`.
"""

from megatron_ds.engine.base import Engine, Losses, MicroBatch, ShardReader, StepResult
from megatron_ds.engine.build import build_engine
from megatron_ds.engine.built_module import BuiltModule
from megatron_ds.engine.device_settings import DEFAULT_SETTINGS, DeviceSettings
from megatron_ds.engine.distributed import device_count, device_type, preload, start_distributed, stop_distributed
from megatron_ds.engine.module import EngineOptions, build_module
from megatron_ds.engine.optimizers import ADAM_STATE, OPTIMIZERS, GuardedOptimizer, state_kinds_of
from megatron_ds.engine.probe import GradientProbe
from megatron_ds.engine.repeated_pass import RepeatedPass
from megatron_ds.engine.replica_checksums import ReplicaChecksums
from megatron_ds.engine.shared_memory import enable_shared_memory

__all__ = [
    "ADAM_STATE",
    "DEFAULT_SETTINGS",
    "OPTIMIZERS",
    "BuiltModule",
    "DeviceSettings",
    "Engine",
    "EngineOptions",
    "GradientProbe",
    "GuardedOptimizer",
    "Losses",
    "MicroBatch",
    "RepeatedPass",
    "ReplicaChecksums",
    "ShardReader",
    "StepResult",
    "build_engine",
    "build_module",
    "device_count",
    "device_type",
    "enable_shared_memory",
    "preload",
    "start_distributed",
    "state_kinds_of",
    "stop_distributed",
]
