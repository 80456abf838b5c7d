"""Construction of an engine from layer specs.

Allocate the parameters, load the weights, freeze, make the optimizer's parameter groups, initialise DeepSpeed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megatron_ds.config import (
    ContextPlan,
    DeepSpeedSummary,
    OptimizerSection,
    adapt_to_device,
    summarize_deepspeed,
)
from megatron_ds.dtypes import DTYPE_OF_PRECISION
from megatron_ds.engine.base import Engine, ShardReader, weights_of
from megatron_ds.engine.experts import FoldedExperts, declare_experts, fold_experts
from megatron_ds.engine.gradient_norm import read_norm_once
from megatron_ds.engine.gradient_sums import find_gradient_sums
from megatron_ds.engine.mpu import Mpu
from megatron_ds.engine.optimizer import OPTIMIZERS, GuardedOptimizer
from megatron_ds.engine.param_groups import param_groups
from megatron_ds.engine.pipeline.engine import PipelinedModel, PipelineEngine
from megatron_ds.engine.pipeline.partition import partition
from megatron_ds.engine.probe import GradientProbe
from megatron_ds.engine.router_load import find_routers
from megatron_ds.engine.zero import ZeroEngine
from megatron_ds.errors import ConfigError
from megatron_ds.layers import onednn
from megatron_ds.layers.host_offload import HostOffload, copies_of
from megatron_ds.layers.kernels.select import AUTO, Choice, select_kernels
from megatron_ds.layers.moe.balance import RouterSettings
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.layers.recompute import BLOCKS, BLOCKS_WITHOUT_ATTENTION, Recompute
from megatron_ds.models.context import BuildContext
from megatron_ds.models.row_padding import RowPadding
from megatron_ds.models.sequential import LayerSpec, SequentialModel, head_of
from megatron_ds.parallel.context import ContextParallel
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.grid import Grid
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class EngineOptions:
    """Everything besides the model that an engine is built from.

    Attributes:
        deepspeed: the filled DeepSpeed config.
        optimizer: the run file's section; None = a `GradientProbe` instead of an optimizer.
        sequence: Megatron's sequence parallelism.
        context: the communication of the ranks that divide each sequence.
        recompute: "none", "selective" or "full".
        offload_activations: inputs of recomputed blocks are kept in host memory.
        keep_attention: outputs of the attention kernels of recomputed blocks are kept.
        mlp_tile_tokens: see `BuildContext`.
        seed: of dropout, and of initialisation if no weights are read.
        frozen: names of parameters that are not trained.
        compiled: see `BuildContext`.
        routers: coefficients of the losses of mixtures of experts.
        bias_rate: see `Routers`.
        kernels: see `layers.kernels.select_kernels`.
    """

    deepspeed: dict[str, Any]
    optimizer: OptimizerSection | None
    sequence: bool
    recompute: str
    seed: int
    context: ContextPlan = field(default_factory=ContextPlan)
    frozen: frozenset[str] = frozenset()
    compiled: bool = False
    kernels: Choice = AUTO
    routers: RouterSettings = field(default_factory=RouterSettings)
    bias_rate: float = 0.0
    offload_activations: bool = False
    keep_attention: bool = False
    mlp_tile_tokens: int | None = None


def build_engine(
    layers: Callable[[BuildContext], list[LayerSpec]],
    grid: Grid,
    device: torch.device,
    options: EngineOptions,
    read_shard: ShardReader | None = None,
) -> Engine:
    """Build this rank's part of a model, load its weights, and initialise DeepSpeed with it. Collective over the world.

    Args:
        layers: the model's layer specs for a build context.
        grid: the axes and roles of this rank.
        device: the device of its tensors.
        options: everything else that the engine is built from.
        read_shard: the source of the weights; None = random initialisation from the seed, the same at every layout.

    Raises:
        ConfigError: a pipeline stage would have nothing to train; a library's kernel computes something else.
    """
    options, summary = _counting_context(options, grid), summarize_deepspeed(options.deepspeed)
    rng, routers = RngStreams(options.seed, grid, device), replace(options.routers)
    pipelined = grid.pipeline.size > 1
    mpu = Mpu(grid)
    tp, folded = (
        _tensor_parallel(options, grid, eager_products=_multiplies_by_onednn(summary, device)),
        fold_experts(grid),
    )
    kernels = select_kernels(options.kernels, device)
    ctx = BuildContext(
        tp=tp,
        rng=rng,
        recompute=_recompute(options, mpu, rng, device),
        compiled=options.compiled,
        kernels=kernels,
        experts=ExpertParallel(grid.expert, tp, folded.mark) if folded else ExpertParallel(grid.expert, tp),
        routers=routers,
        mlp_tile_tokens=options.mlp_tile_tokens,
    )
    specs = layers(ctx)
    with _allocation(summary, options.deepspeed, mpu, device):
        if pipelined:
            bounds = partition(specs, grid.pipeline.size)
            module: nn.Module = PipelinedModel(specs, bounds, grid.layout, tp.num_parts)
        else:
            module = SequentialModel(specs)
    if summary.zero_stage == 3:
        _gather_for_borrowers(module)
    read = read_shard or (lambda name, spec, axes: initial_shard(name, spec, options.seed, axes))
    _fill(module, grid, read)
    if isinstance(module, PipelinedModel):
        module.equalize_copies()
    _freeze(module, options.frozen)
    declare_experts(module, folded)
    optimizer = _optimizer(module, options.optimizer, device, folded)
    largest = max(grid.shard.size, grid.expert_shard.size) if folded else grid.shard.size
    config = adapt_to_device(options.deepspeed, device.type, largest)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use while it sets bf16 up
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=config,
            mpu=None if pipelined else mpu,  # a PipelineModule has its own
            dist_init_required=False,
        )
    if isinstance(optimizer, GuardedOptimizer):
        for parameters in flat_parameters(engine):
            optimizer.create_state(parameters)
    made: Engine
    head = head_of(specs)
    padding = RowPadding(tp.padded_to, head, options.context.rope)
    shared = (grid, device, optimizer, engine, head, rng, tp.context, padding)
    bucket = int(config["zero_optimization"]["reduce_bucket_size"])
    if pipelined:
        made = PipelineEngine(*shared, bucket=bucket)
    else:
        clip = float(options.deepspeed.get("gradient_clipping", 0.0))
        made = ZeroEngine(*shared, clip=clip, bucket=bucket)
    if summary.zero_stage > 0:
        read_norm_once(engine.optimizer, made.read_norm)
    made.kernels, made.documents = kernels.names, ctx.documents
    made.gradient_sums = find_gradient_sums(engine, device)
    made.routers = find_routers(module, grid, routers, options.bias_rate)
    return made


def _counting_context(options: EngineOptions, grid: Grid) -> EngineOptions:
    """Return options whose batch is what DeepSpeed expects, which takes context ranks for data ranks."""
    batch = options.deepspeed["train_batch_size"] * grid.context.size
    return replace(options, deepspeed={**options.deepspeed, "train_batch_size": batch})


def _multiplies_by_onednn(summary: DeepSpeedSummary, device: torch.device) -> bool:
    """Return whether products are computed by oneDNN, which a compiler would replace by slower ones."""
    return device.type == "cpu" and summary.precision == "fp32" and onednn.faster_here()


def _tensor_parallel(options: EngineOptions, grid: Grid, eager_products: bool) -> TensorParallel:
    """Return the ranks that divide the layers, and each sequence before them."""
    plan = options.context
    context = ContextParallel(grid.context, grid.ulysses, grid.ring, plan.method, plan.zigzag)
    return TensorParallel(grid.tensor, options.sequence, eager_products, context)


@contextmanager
def _allocation(summary: DeepSpeedSummary, config: dict[str, Any], mpu: Mpu, device: torch.device) -> Iterator[None]:
    """Create parameters within the block in the run's dtype and on its device, and partitioned under ZeRO-3."""
    zero_init: AbstractContextManager[Any] = nullcontext()
    if summary.zero_stage == 3:
        with device:
            torch.empty(0)  # torch caches its constructors at the first use; in zero.Init it would cache DeepSpeed's
        zero_init = deepspeed.zero.Init(
            data_parallel_group=mpu.get_data_parallel_group(),
            config_dict_or_path=config,  # for the dtype: 0.19.8 ignores an explicit one and uses bf16 on CPU
            mpu=mpu,
        )
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE_OF_PRECISION[summary.precision])
    try:
        with zero_init, device:
            yield
    finally:
        torch.set_default_dtype(default)


def _gather_for_borrowers(module: nn.Module) -> None:
    """Have ZeRO-3 gather parameters for modules that read those of others.

    DoRA's adapters read those of the layers that they adapt, layers in tiles those of the layers inside.
    """
    for borrower in module.modules():
        for parameter in getattr(borrower, "borrowed", ()):
            deepspeed.zero.register_external_parameter(borrower, parameter)


@torch.no_grad()
def _fill(module: nn.Module, grid: Grid, read_shard: ShardReader) -> None:
    """Set the parameters, one at a time. Under ZeRO-3 the first shard rank reads and broadcasts over shard."""
    renamed: dict[str, str] = getattr(module, "renamed", {})
    for name, parameter in weights_of(module):
        is_divided, spec = hasattr(parameter, "ds_id"), spec_of(parameter)
        gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if is_divided else nullcontext()
        with gathered:
            if not is_divided or grid.shard_of(spec).rank == 0:
                shard = read_shard(renamed.get(name, name), spec, grid.model_axes)
                assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
                parameter.copy_(shard)


def _freeze(module: nn.Module, frozen: frozenset[str]) -> None:
    renamed: dict[str, str] = getattr(module, "renamed", {})
    for name, weight in weights_of(module):
        if renamed.get(name, name) in frozen:
            weight.requires_grad_(False)
            weight.is_frozen = True
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ConfigError("train.freeze leaves nothing to train in a pipeline stage; try parallel.pipeline=1")


def flat_parameters(deepspeed_engine: Any) -> list[Tensor]:
    """Return the tensors that DeepSpeed's inner optimizer updates on this rank.

    They are flat fp32 partitions, (n,), under ZeRO, and the parameters without it.
    """
    if hasattr(deepspeed_engine.optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3 empties param_groups between steps
        return list(deepspeed_engine.optimizer.fp32_partitioned_groups_flat)
    return [one for group in deepspeed_engine.basic_optimizer.param_groups for one in group["params"]]


def _optimizer(
    module: nn.Module, section: OptimizerSection | None, device: torch.device, folded: FoldedExperts | None
) -> torch.optim.Optimizer:
    if section is None:
        return GradientProbe(module.parameters())
    kind = OPTIMIZERS.get(section.name, "optimizer.name")
    return kind.from_section(param_groups(module, section, folded), section, device, **section.options)


def _recompute(options: EngineOptions, mpu: Mpu, rng: RngStreams, device: torch.device) -> Recompute:
    """Return torch's activation checkpointing, or DeepSpeed's if the JSON has a section for it."""
    if options.recompute == "none":
        return Recompute()
    if "activation_checkpointing" not in options.deepspeed:
        checkpoint = BLOCKS_WITHOUT_ATTENTION if options.keep_attention else BLOCKS
        offload = HostOffload(copies_of(device)) if options.offload_activations else None
        return Recompute(options.recompute, checkpoint, rng, offload)
    deepspeed.checkpointing.configure(mpu, deepspeed_config=options.deepspeed)
    return Recompute(options.recompute, deepspeed.checkpointing.checkpoint, rng)
