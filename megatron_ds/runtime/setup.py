"""Plan and build an engine from a model and an engine config; all engine options are made here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from megatron_ds.config import (
    ContextPlan,
    DeepSpeedSummary,
    EngineConfig,
    RunConfig,
    check_activations,
    check_context_length,
    check_data,
    check_engine,
    check_experts,
    check_option_values,
    check_ramped_batches,
    check_recomputation,
    check_state_in_memory,
    fill_deepspeed,
    load_deepspeed,
    plan_context,
    refuse_choices,
    summarize_deepspeed,
)
from megatron_ds.engine import OPTIMIZERS, Engine, EngineOptions, build_engine, enable_shared_memory, state_kinds_of
from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import HFModel
from megatron_ds.layers.kernels import check_choice
from megatron_ds.layers.moe.balance import RouterSettings
from megatron_ds.parallel.grid import Layout, create_grid, with_neighbours
from megatron_ds.registry import check_options
from megatron_ds.runtime.loaded_model import LoadedModel
from megatron_ds.runtime.optimizer_groups import grouped_parameters


@dataclass(frozen=True)
class EnginePlan:
    """The checked plan of an engine, before it is built.

    Attributes:
        config: the engine config.
        layout: sizes of the parallel axes.
        context: the division of the context ranks by their communication.
        deepspeed: the filled DeepSpeed config.
        summary: its ZeRO stage, precision and offload.
    """

    config: EngineConfig
    layout: Layout
    context: ContextPlan
    deepspeed: dict[str, Any]
    summary: DeepSpeedSummary


def plan_engine(
    config: EngineConfig, hf: HFModel, world_size: int, device_type: str, *, trains_part: bool = False
) -> EnginePlan:
    """Check an engine config against a model and the number of ranks, and fill its DeepSpeed config.

    Args:
        config: the engine config.
        hf: the model.
        world_size: number of ranks.
        device_type: torch's name, such as `cpu` or `cuda`.
        trains_part: whether adapters are trained, or parameters are frozen.

    Raises:
        ConfigError: a value is invalid or contradicts another, or a name is not registered.
        TopologyError: a size is not divisible by a number of ranks.
    """
    refuse_choices(parallel=config.parallel.auto)
    check_choice(config.kernels)
    if config.optimizer is not None:
        optimizer = OPTIMIZERS.get(config.optimizer.name, "optimizer.name")
        check_options(optimizer.from_section, 3, config.optimizer.options, "optimizer.options")
        check_option_values(optimizer.from_section, config.optimizer.options, "optimizer.options")
        state_kinds_of(config.optimizer)  # checks the values of the options
        if not optimizer.works_on_nvme:
            check_state_in_memory(config.optimizer.name, load_deepspeed(config.deepspeed))
    shape, mapping = hf.core.shape(), load_deepspeed(config.deepspeed)
    summary = summarize_deepspeed(mapping)
    _check_optimizer(config, summary, device_type)
    data_size = check_engine(config, shape, summary, world_size, device_type)
    check_experts(config, shape, mapping, data_size)
    encoder_decoder = hf.family.model_type if hf.core.has_cross_attention else ""
    check_recomputation(config, mapping, trains_part=trains_part, encoder_decoder=encoder_decoder)
    check_activations(config, mapping, has_dense_layers=hf.core.has_dense_layers)
    parallel = config.parallel
    context = plan_context(parallel.context, shape, parallel.tensor)
    layout = Layout(tensor=parallel.tensor, pipeline=parallel.pipeline, context=context.size, data=data_size)
    return EnginePlan(config, layout, context, fill_deepspeed(mapping, config, data_size, shape.hidden_size), summary)


def plan_run(run: RunConfig, hf: HFModel, world_size: int, device_type: str) -> EnginePlan:
    """Check a run's layout, batches and lengths against its model and the number of ranks, and plan its engine.

    It needs no weights and no data. `train`, the planner and its search check by it.

    Args:
        run: the run file.
        hf: its model.
        world_size: number of ranks.
        device_type: torch's name, such as `cpu` or `cuda`.

    Raises:
        ConfigError: a value is invalid or contradicts another, or a name is not registered.
        TopologyError: a size is not divisible by a number of ranks.
    """
    refuse_choices(parallel=run.parallel.auto, micro_batch=run.train.auto_micro_batch_size)
    trains_part = run.peft is not None or bool(run.train.freeze)
    plan = plan_engine(EngineConfig.of_run(run), hf, world_size, device_type, trains_part=trains_part)
    check_ramped_batches(run, plan.layout.data)
    check_data(run.data, run.parallel, hf.core.shape())
    check_context_length(run.data, run.parallel, plan.context)
    return plan


def _check_optimizer(config: EngineConfig, summary: DeepSpeedSummary, device_type: str) -> None:
    """Refuse an optimizer whose kernels do not run here."""
    if config.optimizer is None or not config.trains:
        return
    name, optimizer = config.optimizer.name, OPTIMIZERS.get(config.optimizer.name)
    here = "cpu" if summary.offload_optimizer else device_type
    if optimizer.device_type not in (None, here):
        offload = ", to which zero_optimization.offload_optimizer moves it" if here != device_type else ""
        raise ConfigError(
            f"optimizer.name={name} runs on {optimizer.device_type} alone, not on {here}{offload}; nearest: adamw"
        )
    if optimizer.package is not None and find_spec(optimizer.package) is None:
        raise ConfigError(
            f"optimizer.name={name} needs {optimizer.package}; try pip install {optimizer.package}, or "
            "optimizer.name=adamw"
        )


def build(model: LoadedModel, plan: EnginePlan, rank: int, device: torch.device) -> Engine:
    """Build one rank's engine. Collective over the world.

    Args:
        model: the model.
        plan: the plan for it.
        rank: this process's global rank.
        device: the device of its tensors.

    Raises:
        ConfigError: see `build_engine` and `enable_shared_memory`.
    """
    has_experts = model.hf.core.shape().num_experts > 0
    expert = plan.config.parallel.expert if has_experts else None
    grid = create_grid(plan.layout, rank, expert, plan.context.ulysses)
    if plan.config.parallel.shared_memory and grid.tensor.size > 1:
        grid = enable_shared_memory(grid)
    elif plan.config.parallel.sequence and device.type == "cpu":
        grid = with_neighbours(grid)
    return build_engine(model.layers, grid, device, engine_options(model, plan), model.read_shard, model.prepare)


def engine_options(model: LoadedModel, plan: EnginePlan) -> EngineOptions:
    """Return the options of the engine that a plan describes for a model.

    Raises:
        ConfigError: see `grouped_parameters`.
    """
    config = plan.config
    return EngineOptions(
        deepspeed=plan.deepspeed,
        optimizer=config.optimizer,
        sequence=config.parallel.sequence,
        context=plan.context,
        recompute=config.recompute,
        offload_activations=config.offload_activations,
        keep_attention=config.keep_attention,
        mlp_tile_tokens=config.mlp_tile_tokens,
        seed=config.seed,
        frozen=model.frozen,
        groups=grouped_parameters(model, config.optimizer),
        compiled=config.compile,
        kernels=config.kernels,
        routers=RouterSettings(config.moe_aux_loss, config.moe_z_loss),
        bias_rate=config.moe_bias_rate,
        trains=config.trains,
        ema=config.ema,
    )
