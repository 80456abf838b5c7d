"""Collectives of ZeRO-3: gathers of weights and reductions of gradients by DeepSpeed 0.19.8, in its buckets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_ds.planner.held_parameters import HeldParameter, HeldStage
from megatron_ds.planner.operations import Collective, LayerTrace, Work
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.traffic.gradients import EXPERT_SHARD, SHARD, gradient_order, shard_ranks
from megatron_ds.planner.weight_schedule import (
    Change,
    WeightChange,
    WeightSchedule,
    divided_numel,
    module_passes,
    persistent,
)
from megatron_ds.planner.zero_settings import ZeroSettings

HPZ = "hpz"
"""The ranks of a node that hold a second division of the weights; see `zero_hpz_partition_size`."""


def divided_weight_gathers(given: PlanInput, held: HeldStage, zero: ZeroSettings, traces: Sequence[LayerTrace]) -> Work:
    """Return the gathers of weights in the passes of a step, and of those that are kept, after the update.

    Args:
        given: the run.
        held: the only stage.
        zero: DeepSpeed's settings.
        traces: of all layers.
    """
    passes = module_passes(traces)
    schedule = WeightSchedule(zero, held.parameters, held.used, passes, given.num_micro_batches)
    first = _gathered(given, zero, schedule.run())
    again = _gathered(given, zero, schedule.run()) if given.num_micro_batches > 1 else Work()
    found = first + again.times(given.num_micro_batches - 1)
    for one in persistent(held.parameters, zero):
        found += _gathered(given, zero, [WeightChange(Change.GATHER, (one,))])
    return found


def _gathered(given: PlanInput, zero: ZeroSettings, changes: Iterable[WeightChange]) -> Work:
    """Return the collectives of gathers: one for all weights of the same ranks, or one for each."""
    found = Work()
    for one in changes:
        for apart in (False, True) if one.change == Change.GATHER else ():
            axis, ranks = (EXPERT_SHARD if apart else SHARD), shard_ranks(given, apart=apart)
            weights = [weight for weight in one.weights if weight.apart == apart]
            sizes = [divided_numel(weight, ranks) * zero.element_bytes for weight in weights]
            if ranks == 1 or not sizes:
                continue
            if one.second:
                axis, ranks = HPZ, zero.hpz
            coalesced = len(sizes) > 1 and not zero.allgather_sequential
            if coalesced and zero.use_all_reduce_for_fetch_params and not one.second:
                found[Collective("all_reduce", axis, sum(sizes), ranks)] += 1
                continue
            sizes = [sum(sizes)] if coalesced else sizes
            found.update(Collective("all_gather", axis, size, ranks) for size in sizes)
    return found


def gradient_scatters(
    given: PlanInput, held: HeldStage, zero: ZeroSettings, traces: Sequence[LayerTrace] | None = None
) -> Work:
    """Return the reductions of gradients in a step: a reduce-scatter for each bucket, after each micro-batch.

    Args:
        given, held, zero: the run, the parameters of the stage, and DeepSpeed's settings.
        traces: see `gradient_order`.
    """
    found, bucket = Work(), list[HeldParameter]()
    for one in gradient_order(held, traces):
        full = sum(other.numel for other in bucket) + one.numel > zero.reduce_bucket_size
        if bucket and (full or bucket[0].apart != one.apart):
            found += _scattered(given, bucket, zero)
            bucket = []
        bucket.append(one)
    if bucket:
        found += _scattered(given, bucket, zero)
    return found.times(given.num_micro_batches)


def _scattered(given: PlanInput, bucket: Sequence[HeldParameter], zero: ZeroSettings) -> Work:
    apart, total = bucket[0].apart, sum(one.numel for one in bucket)
    axis, ranks = (EXPERT_SHARD if apart else SHARD), shard_ranks(given, apart=apart)
    if ranks == 1:
        return Work()
    if zero.contiguous_gradients and total <= zero.reduce_bucket_size and not zero.reduce_scatter:
        return Work([Collective("all_reduce", axis, total * zero.reduced_bytes, ranks)])
    padded = sum(divided_numel(one, ranks) for one in bucket)
    return Work([Collective("reduce_scatter", axis, padded * zero.reduced_bytes, ranks)])


def sub_groups(given: PlanInput, group: Sequence[HeldParameter], zero: ZeroSettings) -> list[list[HeldParameter]]:
    """Return the parts of a parameter group that the optimizer updates one after another."""
    ranks = shard_ranks(given, apart=group[0].apart)
    found: list[list[HeldParameter]] = [[]]
    total = 0
    for one in group:
        if total >= zero.sub_group_size:
            found.append([])
            total = 0
        found[-1].append(one)
        total += divided_numel(one, ranks) // ranks
    return found
