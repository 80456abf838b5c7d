"""A rank's part of a model as a module with its weights, before DeepSpeed is initialised with it.

Choose the implementations, allocate the parameters, load the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
from torch import nn

from megatron_ds.config import ContextPlan, DeepSpeedSummary, EmaSection, OptimizerSection, summarize_deepspeed
from megatron_ds.dtypes import DTYPE_OF_PRECISION
from megatron_ds.engine.base import PrepareReading, ShardReader, weights_of
from megatron_ds.engine.built_module import BuiltModule
from megatron_ds.engine.experts import fold_experts
from megatron_ds.engine.mpu import Mpu
from megatron_ds.engine.pipeline.module import PipelinedModel
from megatron_ds.engine.pipeline.partition import partition
from megatron_ds.layers import onednn
from megatron_ds.layers.host_offload import HostOffload, copies_of
from megatron_ds.layers.kernels.select import AUTO, Choice, select_kernels
from megatron_ds.layers.moe.balance import RouterSettings
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.layers.recompute import BLOCKS, BLOCKS_WITHOUT_ATTENTION, Recompute
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import LayerSpec, SequentialModel
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
        trains: False = the engine only evaluates, and holds nothing but weights: DeepSpeed gets no optimizer.
        sequence: Megatron's sequence parallelism.
        context: the communication of the ranks that divide each sequence.
        recompute: "none", "selective" or "full".
        offload_activations: inputs of recomputed blocks are kept in host memory.
        keep_attention: outputs of the attention kernels of recomputed blocks are kept.
        mlp_tile_tokens: see `BuildContext`.
        seed: of dropout, and of initialisation if no weights are read.
        frozen: names of parameters that are not trained.
        groups: name of a parameter -> index of its entry in `optimizer.groups`.
        ema: settings of an average of the weights; None = the weights are not averaged.
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
    groups: Mapping[str, int] = field(default_factory=dict)
    ema: EmaSection | None = None
    compiled: bool = False
    kernels: Choice = AUTO
    routers: RouterSettings = field(default_factory=RouterSettings)
    bias_rate: float = 0.0
    offload_activations: bool = False
    keep_attention: bool = False
    mlp_tile_tokens: int | None = None
    trains: bool = True


def build_module(
    layers: Callable[[BuildContext], list[LayerSpec]],
    grid: Grid,
    device: torch.device,
    options: EngineOptions,
    read_shard: ShardReader | None = None,
    prepare: PrepareReading | None = None,
) -> BuiltModule:
    """Build this rank's part of a model and load its weights. Collective over the world.

    Args:
        layers, grid, device, read_shard, prepare: see `build_engine`.
        options: see `build_engine`; of the DeepSpeed config the precision, the ZeRO stage and the section of
            recomputation are read.

    Raises:
        ConfigError: a library's kernel computes something else.
    """
    summary = summarize_deepspeed(options.deepspeed)
    rng, routers, mpu = RngStreams(options.seed, grid, device), replace(options.routers), Mpu(grid)
    tp = _tensor_parallel(options, grid, eager_products=_multiplies_by_onednn(summary, device))
    folded = fold_experts(grid)
    ctx = BuildContext(
        tp=tp,
        rng=rng,
        recompute=_recompute(options, mpu, rng, device),
        compiled=options.compiled,
        kernels=select_kernels(options.kernels, device),
        experts=ExpertParallel(grid.expert, tp, folded.mark) if folded else ExpertParallel(grid.expert, tp),
        routers=routers,
        mlp_tile_tokens=options.mlp_tile_tokens,
    )
    specs = layers(ctx)
    with _allocation(summary, options.deepspeed, mpu, device):
        if grid.pipeline.size > 1:
            bounds = partition(specs, grid.pipeline.size)
            module: SequentialModel | PipelinedModel = PipelinedModel(specs, bounds, grid.layout, tp.num_parts)
        else:
            module = SequentialModel(specs)
    if summary.zero_stage == 3:
        _gather_for_borrowers(module)
    if prepare is not None:
        prepare(_read_here(module, grid))
    _fill(module, grid, read_shard or (lambda name, spec, axes: initial_shard(name, spec, options.seed, axes)))
    if isinstance(module, PipelinedModel):
        module.equalize_copies()
    return BuiltModule(module, specs, ctx, rng, mpu, folded)


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


def _read_here(module: nn.Module, grid: Grid) -> list[str]:
    """Return the names of the parameters that this rank reads in `_fill`."""
    renamed: dict[str, str] = getattr(module, "renamed", {})
    return [
        renamed.get(name, name)
        for name, parameter in weights_of(module)
        if not hasattr(parameter, "ds_id") or grid.shard_of(spec_of(parameter)).rank == 0
    ]


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
