"""Inputs of plans, from a model's config alone."""

import tempfile
from collections.abc import Mapping
from typing import Any

from megatron_ds.config import EngineConfig, build_section
from megatron_ds.config.run_config import ModelSection
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.runtime.loaded_model import describe_model, read_model_section
from megatron_ds.runtime.optimizer_groups import grouped_parameters
from megatron_ds.runtime.setup import plan_engine


def input_of(model: Mapping[str, Any], engine: Mapping[str, Any], rows: Rows, machines: Machines) -> PlanInput:
    """The input of a plan.

    Args:
        model: fields of a Hugging Face config, `model_type` included.
        engine: fields of an `EngineConfig`.
        rows: of a batch.
        machines: that it runs on.
    """
    from transformers import AutoConfig

    fields = {name: value for name, value in model.items() if name != "model_type"}
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(model["model_type"], **fields).save_pretrained(folder)
        section = ModelSection(path=folder)
        hf = read_model_section(section)
        described = describe_model(hf, section)
    config = build_section(EngineConfig, dict(engine), keep=("optimizer",))
    plan = plan_engine(config, hf, machines.world_size, machines.device_type)
    groups = grouped_parameters(described, config.optimizer)
    return PlanInput(described.layers, hf.core, plan, rows, machines, groups=groups)
