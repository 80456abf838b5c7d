"""Configuration of a run: the run file, the DeepSpeed JSON, and the checks of both against a model and its ranks."""

from megatron_ds.config.activation_checks import check_activations
from megatron_ds.config.automatic import refuse_choices
from megatron_ds.config.batch_ramp import BatchSizes
from megatron_ds.config.checks import (
    ModelShape,
    check_data,
    check_engine,
    check_layout,
    check_ramped_batches,
    check_run,
    check_target_length,
)
from megatron_ds.config.context_plan import (
    ContextNames,
    ContextPlan,
    check_context_length,
    describe_context,
    plan_context,
)
from megatron_ds.config.context_section import ContextMethod, ContextSection
from megatron_ds.config.data_section import DataSection, DataSource
from megatron_ds.config.deepspeed_checks import (
    check_recomputation,
    check_repeats,
    check_saving,
    check_state_in_memory,
)
from megatron_ds.config.deepspeed_json import (
    DeepSpeedSummary,
    adapt_to_device,
    fill_deepspeed,
    load_deepspeed,
    summarize_deepspeed,
)
from megatron_ds.config.engine_config import EngineConfig
from megatron_ds.config.expert_checks import ExpertNames, check_expert_layout, check_experts
from megatron_ds.config.length_checks import check_ramped_lengths
from megatron_ds.config.length_ramp import LengthStage, length_stages
from megatron_ds.config.load import build_run, build_section, dump_run, load_run
from megatron_ds.config.mixture_start import MixtureStart, parse_start
from megatron_ds.config.optimizer_groups import OptimizerGroup
from megatron_ds.config.option_values import check_option_values
from megatron_ds.config.run_config import (
    CheckpointSection,
    EmaSection,
    ExportSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunConfig,
    ScheduleSection,
    TrainSection,
)

__all__ = [
    "BatchSizes",
    "CheckpointSection",
    "ContextMethod",
    "ContextNames",
    "ContextPlan",
    "ContextSection",
    "DataSection",
    "DataSource",
    "DeepSpeedSummary",
    "EmaSection",
    "EngineConfig",
    "ExpertNames",
    "ExportSection",
    "LengthStage",
    "MixtureStart",
    "ModelSection",
    "ModelShape",
    "OptimizerGroup",
    "OptimizerSection",
    "ParallelSection",
    "RunConfig",
    "ScheduleSection",
    "TrainSection",
    "adapt_to_device",
    "build_run",
    "build_section",
    "check_activations",
    "check_context_length",
    "check_data",
    "check_engine",
    "check_expert_layout",
    "check_experts",
    "check_layout",
    "check_option_values",
    "check_ramped_batches",
    "check_ramped_lengths",
    "check_recomputation",
    "check_repeats",
    "check_run",
    "check_saving",
    "check_state_in_memory",
    "check_target_length",
    "describe_context",
    "dump_run",
    "fill_deepspeed",
    "length_stages",
    "load_deepspeed",
    "load_run",
    "parse_start",
    "plan_context",
    "refuse_choices",
    "summarize_deepspeed",
]
