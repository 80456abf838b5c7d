"""The input of a plan from a model's config alone, without a run file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_ds.config import EngineConfig, build_section
from megatron_ds.config.run_config import ModelSection
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.runtime.loaded_model import describe_model, read_model_section
from megatron_ds.runtime.optimizer_groups import grouped_parameters
from megatron_ds.runtime.setup import plan_engine


def input_of(model: Mapping[str, Any], engine: Mapping[str, Any], rows: Rows, machines: Machines) -> PlanInput:
    """Return the input of a plan.

    Args:
        model: fields of a Hugging Face config, `model_type` included.
        engine: fields of an `EngineConfig`.
        rows: of a batch.
        machines: that it runs on.

    Raises:
        ConfigError: a field is invalid.
    """
    section = build_section(ModelSection, {"config": dict(model)}, "model")
    hf = read_model_section(section)
    described = describe_model(hf, section)
    config = build_section(EngineConfig, dict(engine), keep=("optimizer",))
    plan = plan_engine(config, hf, machines.world_size, machines.device_type)
    groups = grouped_parameters(described, config.optimizer)
    return PlanInput(described.layers, hf.core, plan, rows, machines, groups=groups)
