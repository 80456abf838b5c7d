"""Communication of the engine in a step, besides that of the layers: gradients, weights, stages, losses and norms.

It follows from `megatron_ds.engine` and from DeepSpeed 0.19.8, whose functions are named where they decide. Sizes are
exact. Axes are the roles of `parallel.grid`, and more: `model` are the ranks of all pipeline stages and tensor ranks
with the same data, `stage` all ranks of a stage, `tied` the stages that hold copies of a parameter, and `hpz` the ranks
of a node that share ZeRO-3's second division of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ds.columns import ATTENTION_MASK, COLUMNS, DOCUMENT_BOUNDS, INPUT_IDS, POSITION_IDS, find_column
from megatron_ds.engine.optimizers import OPTIMIZERS, GuardedOptimizer
from megatron_ds.models.sequential import HeadSpec, LayerSpec, head_of
from megatron_ds.planner.held_parameters import HeldStage, build_context, hold_stage
from megatron_ds.planner.operations import Collective, CollectiveKind, LayerTrace, Message, Work
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.trace import trace_layers
from megatron_ds.planner.traffic.gradients import (
    EXPERT_SHARD,
    SHARD,
    gradient_reductions,
    shard_ranks,
    tied_sums,
    weight_gathers,
)
from megatron_ds.planner.traffic.optimizers import OptimizerTraffic, optimizer_traffic
from megatron_ds.planner.traffic.zero3 import divided_weight_gathers, gradient_scatters, sub_groups
from megatron_ds.planner.zero_settings import ZeroSettings, zero_settings

FP32_BYTES, FP64_BYTES, INT32_BYTES, INT64_BYTES = 4, 8, 4, 8
_COLUMN_BYTES: Mapping[str, int] = {"bool": 1, "int64": INT64_BYTES}
LEAST_NORMS = 4
"""The least number of parameter groups whose norms are reduced; see `engine.gradient_norm`."""


@dataclass(frozen=True)
class EngineTraffic:
    """Communication of a rank in one step, by what it is for.

    Attributes:
        gradients: reductions over data ranks, and over the stages that hold copies of a parameter.
        weights: gathers of updated weights, and of those that ZeRO-3 divides.
        pipeline: activations and their gradients, between stages.
        norms: the gradient norm.
        losses: label counts, loss sums, and statistics of routers.
        optimizer: of optimizers whose updates need whole matrices.
    """

    gradients: Work = field(default_factory=Work)
    weights: Work = field(default_factory=Work)
    pipeline: Work = field(default_factory=Work)
    norms: Work = field(default_factory=Work)
    losses: Work = field(default_factory=Work)
    optimizer: OptimizerTraffic = field(default_factory=OptimizerTraffic)

    @property
    def total(self) -> Work:
        """All of it."""
        return self.gradients + self.weights + self.pipeline + self.norms + self.losses + self.optimizer.first


def engine_traffic(
    given: PlanInput,
    stage: int,
    held: HeldStage | None = None,
    traces: Sequence[LayerTrace] | None = None,
) -> EngineTraffic:
    """Return the communication of the engine on a rank of a pipeline stage, in a step after the first two.

    Args:
        given: the run.
        stage: index of the pipeline stage.
        held: its parameters; None = they are found by `hold_stage`.
        traces: of all layers; None = they are made here at ZeRO-3. At other stages the number of gradient buckets is an
            estimate without them, where gradients are reduced during the backward pass. Their bytes are exact.
    """
    held, zero = held or hold_stage(given, stage), zero_settings(given)
    if zero.stage == 3:
        traces = traces if traces is not None else trace_layers(given.layers, given.trace_setting())
        gradients = gradient_scatters(given, held, zero, traces)
        weights = divided_weight_gathers(given, held, zero, traces)
    else:
        gradients = gradient_reductions(given, held, zero, traces) + tied_sums(held, zero)
        weights = weight_gathers(given, held, zero)
    return EngineTraffic(
        gradients,
        weights,
        stage_messages(given, stage),
        gradient_norm(given, held, zero),
        losses(given, stage),
        optimizer_traffic(given, held, zero),
    )


def _collectives(*each: tuple[CollectiveKind, str, int, int]) -> Work:
    """Return collectives of kind, axis, bytes and ranks, without those of one rank."""
    return Work(Collective(*one) for one in each if one[3] > 1 and one[2] > 0)


def losses(given: PlanInput, stage: int) -> Work:
    """Return the sums of label counts, losses, metrics, and statistics of routers; see `engine.base.Engine`.

    With several stages DeepSpeed averages the loss once more over data ranks of the last stage, and sends it and this
    average to all stages (`PipelineEngine._aggregate_total_loss`).
    """
    layout, head = given.layout, _head(given)
    over_loss = layout.data * layout.context
    found = _collectives(
        ("all_reduce", "loss", head.num_sums * FP32_BYTES, over_loss),
        ("all_reduce", "pipeline", head.num_sums * FP32_BYTES, layout.pipeline),
        ("all_reduce", "world", num_router_sums(given) * FP64_BYTES, layout.world_size),
    )
    if layout.data > 1:
        found += _collectives(("all_reduce", "host", len(head.terms) * INT64_BYTES, layout.world_size))
    if layout.pipeline > 1:
        found += _collectives(("broadcast", "pipeline", 2 * FP32_BYTES, layout.pipeline))
        if stage == layout.pipeline - 1:
            found += _collectives(("all_reduce", "shard", FP32_BYTES, over_loss))
    return found


def num_router_sums(given: PlanInput) -> int:
    """Return the length of `engine.router_load.Routers.collect`: two more numbers than experts for each router."""
    mixtures = [stack.moe for stack in given.core.stacks.values() if stack.moe is not None]
    return sum(len(moe.layers) * (moe.router.num_experts + 2) for moe in mixtures)


def gradient_norm(given: PlanInput, held: HeldStage, zero: ZeroSettings) -> Work:
    """Return the reductions of the gradient norm; see `engine.gradient_norm`, and `ZeroEngine._clipped` at stage 0."""
    layout, experts = given.layout, given.core.shape().num_experts > 0
    pipelined, over_shard = layout.pipeline > 1, layout.data * layout.context
    model = ("model", layout.pipeline * layout.tensor) if pipelined else ("tensor", layout.tensor)
    over_experts = ("expert", given.expert_ranks)
    if zero.stage == 0:
        found = _collectives(("all_reduce", "tensor", FP32_BYTES, layout.tensor))
        return found + _collectives(("all_reduce", over_experts[0], FP32_BYTES, over_experts[1])) if experts else found
    if zero.bf16_sums:
        found = _collectives(("all_reduce", model[0], FP32_BYTES, model[1]))
        apart = any(one.apart for one in held.trained)
        return found + _collectives(("all_reduce", over_experts[0], FP32_BYTES, over_experts[1])) if apart else found
    if zero.offloads_optimizer:
        return _norm_of_offloaded(given, held, zero, model)
    most = max(LEAST_NORMS, *(num_groups(given, held, other) for other in range(layout.pipeline)))
    if zero.stage == 3:
        most = max(most, sum(len(sub_groups(given, group, zero)) for group in held.groups))
    num_bytes = most * (FP64_BYTES if zero.stage == 3 else FP32_BYTES)
    return _collectives(("all_reduce", "shard", num_bytes, over_shard), ("all_reduce", model[0], num_bytes, model[1]))


def num_groups(given: PlanInput, held: HeldStage, stage: int) -> int:
    """Return the number of parameter groups of the optimizer in a stage; 0 if there cannot be more than `LEAST_NORMS`.

    With weight decay or without, of experts or not: only entries of `optimizer.groups` and keys of an optimizer's own
    make more.
    """
    section = given.config.optimizer
    if stage == held.index:
        return len(held.groups)
    own = section is not None and _has_keys_of_its_own(OPTIMIZERS.get(section.name))
    return len(hold_stage(given, stage).groups) if own or given.groups else 0


def _has_keys_of_its_own(optimizer: type[GuardedOptimizer]) -> bool:
    inherited = GuardedOptimizer.group_options.__func__  # type: ignore[attr-defined]
    return optimizer.group_options.__func__ is not inherited  # type: ignore[attr-defined]


def _norm_of_offloaded(given: PlanInput, held: HeldStage, zero: ZeroSettings, model: tuple[str, int]) -> Work:
    """Return the reductions of the norm of gradients in host memory; at stage 3 one for each sub-group."""
    over_shard, found = shard_ranks(given, apart=False), Work()
    if zero.stage < 3:
        return _collectives(
            ("all_reduce", "shard", FP32_BYTES, over_shard), ("all_reduce", model[0], FP32_BYTES, model[1])
        )
    for group in held.groups:
        apart = group[0].apart
        second = ("expert", given.expert_ranks) if apart else model
        axis = EXPERT_SHARD if apart else SHARD
        each = _collectives(
            ("all_reduce", axis, FP32_BYTES, shard_ranks(given, apart=apart)),
            ("all_reduce", second[0], FP32_BYTES, second[1]),
        )
        found += each.times(len(sub_groups(given, group, zero)))
    return found


def stage_messages(given: PlanInput, stage: int) -> Work:
    """Return the messages of a rank to the stages before and after it; see `engine.pipeline.boundary`.

    Shapes are sent once, in the first step. A micro-batch's hidden states of a boundary go forward in one message, and
    so does each column of the batch that later layers read; the gradient of the hidden states comes back.
    """
    specs, bounds = given.layers(build_context(given)), given.stage_bounds
    found, each = Work(), given.num_micro_batches
    if stage + 1 < given.layout.pipeline:
        after = specs[bounds[stage + 1]]
        found[Message("pipeline", _hidden_bytes(given, after))] += each
        for num_bytes in _column_bytes(given, specs[0], after):
            found[Message("pipeline", num_bytes)] += each
    if stage > 0:
        found[Message("pipeline", _hidden_bytes(given, specs[bounds[stage]]))] += each
    return found


def padded_length(given: PlanInput, length: int) -> int:
    """Return the length to which rows are padded for the ranks that divide them; see `models.row_padding`."""
    multiple = build_context(given).tp.padded_to
    return -(-length // multiple) * multiple


def _hidden_bytes(given: PlanInput, entry: LayerSpec) -> int:
    """Return the size of the hidden states that enter a layer, in one tensor."""
    parts = build_context(given).tp.num_parts
    positions = sum(_length(given, column) // parts for column in entry.hidden.values())
    element_bytes = given.dtype.itemsize
    return positions * given.config.micro_batch_size * given.core.shape().hidden_size * element_bytes


def _length(given: PlanInput, column: str) -> int:
    (length,) = find_column(column).shape(given.rows.seq_length, given.rows.target_length)
    return padded_length(given, length)


def _column_bytes(given: PlanInput, first: LayerSpec, entry: LayerSpec) -> list[int]:
    """Return the sizes of a batch's columns that enter a layer; masks are sent as bytes.

    Where documents share rows, their bounds are sent too; see `layers.documents`.
    """
    rows, columns = given.config.micro_batch_size, columns_of(given)
    there = [name for name in entry.columns if name in columns and name in first.columns and name in COLUMNS]
    found = [rows * _length(given, name) * _COLUMN_BYTES[find_column(name).dtype] for name in there]
    if POSITION_IDS.name in columns and DOCUMENT_BOUNDS in entry.columns:
        found.append(rows * (given.trace_setting().documents + 1) * INT32_BYTES)
    return found


def columns_of(given: PlanInput) -> tuple[str, ...]:
    """Return the columns of a batch on the device, with the mask of rows that are padded."""
    columns, length = given.rows.columns, given.rows.seq_length
    adds_mask = padded_length(given, length) != length and INPUT_IDS.name in columns
    return (*columns, ATTENTION_MASK.name) if adds_mask and ATTENTION_MASK.name not in columns else columns


def _head(given: PlanInput) -> HeadSpec:
    return head_of(given.layers(build_context(given)))
