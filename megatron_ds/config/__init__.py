"""What a run is: the run file, the DeepSpeed JSON, and whether both fit a model on a number of ranks."""

from megatron_ds.config.checks import ModelShape, check_layout, check_run, check_target_length
from megatron_ds.config.data_section import DataSection, DataSource
from megatron_ds.config.deepspeed_json import DeepSpeedSummary, fill_deepspeed, load_deepspeed, summarize_deepspeed
from megatron_ds.config.load import build_run, dump_run, load_run
from megatron_ds.config.run_config import (
    CheckpointSection,
    ExportSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunConfig,
    ScheduleSection,
    TrainSection,
)

__all__ = [
    "CheckpointSection",
    "DataSection",
    "DataSource",
    "DeepSpeedSummary",
    "ExportSection",
    "ModelSection",
    "ModelShape",
    "OptimizerSection",
    "ParallelSection",
    "RunConfig",
    "ScheduleSection",
    "TrainSection",
    "build_run",
    "check_layout",
    "check_run",
    "check_target_length",
    "dump_run",
    "fill_deepspeed",
    "load_deepspeed",
    "load_run",
    "summarize_deepspeed",
]
