"""Construction of an engine from layer specs.

Build the module, freeze, make the optimizer's parameter groups, initialise DeepSpeed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megatron_ds.config import adapt_to_device, summarize_deepspeed
from megatron_ds.engine.base import Engine, PrepareReading, ShardReader, weights_of
from megatron_ds.engine.experts import FoldedExperts, declare_experts
from megatron_ds.engine.gradient_norm import read_norm_once
from megatron_ds.engine.gradient_sums import find_gradient_sums
from megatron_ds.engine.matrix_updates import plan_updates
from megatron_ds.engine.module import EngineOptions, build_module
from megatron_ds.engine.optimizers import GuardedOptimizer, WeightAverage, begin_average, make_optimizer
from megatron_ds.engine.param_groups import param_groups
from megatron_ds.engine.pipeline.engine import PipelineEngine
from megatron_ds.engine.probe import GradientProbe
from megatron_ds.engine.router_load import find_routers
from megatron_ds.engine.zero import ZeroEngine
from megatron_ds.errors import ConfigError
from megatron_ds.models.context import BuildContext
from megatron_ds.models.row_padding import RowPadding
from megatron_ds.models.sequential import LayerSpec, head_of
from megatron_ds.parallel.grid import Grid


def build_engine(
    layers: Callable[[BuildContext], list[LayerSpec]],
    grid: Grid,
    device: torch.device,
    options: EngineOptions,
    read_shard: ShardReader | None = None,
    prepare: PrepareReading | None = None,
) -> Engine:
    """Build this rank's part of a model, load its weights, and initialise DeepSpeed with it. Collective over the world.

    Args:
        layers: the model's layer specs for a build context.
        grid: the axes and roles of this rank.
        device: the device of its tensors.
        options: everything else that the engine is built from.
        read_shard: the source of the weights; None = random initialisation from the seed, the same at every layout.
        prepare: called on every rank with the names of the parameters that it reads, before the first is read.

    Raises:
        ConfigError: a pipeline stage would have nothing to train; a library's kernel computes something else.
    """
    options, summary = _counting_context(options, grid), summarize_deepspeed(options.deepspeed)
    pipelined = grid.pipeline.size > 1
    built = build_module(layers, grid, device, options, read_shard, prepare)
    module, folded = built.module, built.folded
    _freeze(module, options.frozen, options.trains)
    declare_experts(module, folded)
    optimizer = _optimizer(module, options, device, folded)
    if isinstance(optimizer, GuardedOptimizer):
        optimizer.check_groups(grid)
    largest = max(grid.shard.size, grid.expert_shard.size) if folded else grid.shard.size
    config = adapt_to_device(options.deepspeed, device.type, largest)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use while it sets bf16 up
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer if options.trains else None,
            config=config,
            mpu=None if pipelined else built.mpu,  # a PipelineModule has its own
            dist_init_required=False,
        )
    if isinstance(optimizer, GuardedOptimizer):
        for flat, group in flat_parameters(engine):
            optimizer.create_state(flat, group)
        if options.ema is not None:
            begin_average(optimizer, [flat for flat, _ in flat_parameters(engine)])
            optimizer.average = WeightAverage(options.ema.decay, options.ema.start_step)
    made: Engine
    head, ctx = head_of(built.specs), built.context
    padding = RowPadding(ctx.tp.padded_to, head, options.context.rope)
    shared = (grid, device, optimizer, engine, head, built.rng, ctx.tp.context, padding)
    bucket = int(config["zero_optimization"]["reduce_bucket_size"])
    if pipelined:
        made = PipelineEngine(*shared, bucket=bucket)
    else:
        clip = float(options.deepspeed.get("gradient_clipping", 0.0))
        made = ZeroEngine(*shared, clip=clip, bucket=bucket)
    if summary.zero_stage > 0 and options.trains:
        read_norm_once(engine.optimizer, made.read_norm)
    if isinstance(optimizer, GuardedOptimizer):
        plan_updates(made, flat_parameters(engine))
    made.built = built
    made.kernels, made.documents = ctx.kernels.names, ctx.documents
    made.gradient_sums = find_gradient_sums(engine, device)
    made.routers = find_routers(module, grid, ctx.routers, options.bias_rate)
    return made


def _counting_context(options: EngineOptions, grid: Grid) -> EngineOptions:
    """Return options whose batch is what DeepSpeed expects, which takes context ranks for data ranks."""
    batch = options.deepspeed["train_batch_size"] * grid.context.size
    return replace(options, deepspeed={**options.deepspeed, "train_batch_size": batch})


def _freeze(module: nn.Module, frozen: frozenset[str], trains: bool) -> None:
    renamed: dict[str, str] = getattr(module, "renamed", {})
    for name, weight in weights_of(module):
        if renamed.get(name, name) in frozen:
            weight.requires_grad_(False)
            weight.is_frozen = True
    if trains and not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError("train.freeze leaves nothing to train in a pipeline stage; try parallel.pipeline=1")


def flat_parameters(deepspeed_engine: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return the tensors that DeepSpeed's inner optimizer updates on this rank, each with its parameter group.

    They are flat fp32 partitions, (n,), under ZeRO, and the parameters without it.
    """
    zero, groups = deepspeed_engine.optimizer, deepspeed_engine.basic_optimizer.param_groups
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3 empties param_groups between steps
        flat = zero.fp32_partitioned_groups_flat
        return [(one, groups[zero.sub_group_to_group_id[number]]) for number, one in enumerate(flat)]
    return [(one, group) for group in groups for one in group["params"]]


def _optimizer(
    module: nn.Module, options: EngineOptions, device: torch.device, folded: FoldedExperts | None
) -> torch.optim.Optimizer:
    section = options.optimizer
    if section is None:
        return GradientProbe(module.parameters())
    return make_optimizer(param_groups(module, section, folded, options.groups), section, device)
