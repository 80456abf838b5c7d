"""Reductions of gradients and gathers of weights by DeepSpeed 0.19.8 at ZeRO-0, 1 and 2, in its buckets.

Gradients are never scattered at these stages: each data rank gets the sum of all of them in all-reduces, and stages 1
and 2 keep their part. Stage 2 does so after each micro-batch, the others after the last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron_ds.planner.held_parameters import HeldParameter, HeldStage, num_elements
from megatron_ds.planner.operations import Collective, CollectiveKind, LayerTrace, Work
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.zero_settings import ZeroSettings, padded

SHARD, EXPERT_SHARD = "shard", "expert_shard"
"""Roles of the ranks that hold the same parameters, of experts and of all others; see `parallel.grid`."""


def shard_ranks(given: PlanInput, *, apart: bool) -> int:
    """Return the number of ranks over which gradients are reduced, of experts that are `apart` or of all others."""
    layout = given.layout
    shards = layout.data * layout.context
    return shards * layout.tensor // given.expert_ranks if apart else shards


def gradient_order(held: HeldStage, traces: Sequence[LayerTrace] | None) -> list[HeldParameter]:
    """Return the parameters of a stage in the order in which their gradients are complete in a backward pass.

    Args:
        held: the stage.
        traces: of all layers of the model; None = about that order, the reverse of the module's.
    """
    found: dict[str, HeldParameter] = {}
    by_name = {one.name: one for one in held.trained}
    for trace in reversed(traces[held.layers.start : held.layers.stop] if traces is not None else ()):
        for name in (f"{trace.name}.{moment.parameter}" for moment in trace.in_backward):
            if name in by_name:  # a tied parameter's is complete in the first layer that has it
                found[name] = by_name[name]
    return [*found.values(), *(one for one in reversed(held.trained) if one.name not in found)]


def gradient_reductions(
    given: PlanInput, held: HeldStage, zero: ZeroSettings, traces: Sequence[LayerTrace] | None = None
) -> Work:
    """Return the all-reduces of gradients over data ranks in a step of a rank, below stage 3.

    Args:
        given, held, zero: the run, the parameters of the stage, and DeepSpeed's settings.
        traces: see `gradient_order`.
    """
    if zero.bf16_sums:
        return _of_flat_sums(given, held, zero)
    if zero.stage == 0:
        return _of_stage_0(given, held, zero)
    found = Work()
    for bucket in _buckets(_reduction_order(held, zero, traces), zero):
        found += _of_bucket(given, held, bucket, zero)
    return found.times(given.num_micro_batches if zero.stage == 2 else 1)


def weight_gathers(given: PlanInput, held: HeldStage, zero: ZeroSettings) -> Work:
    """Return the all-gathers of updated weights in a step of a rank, at stages 1 and 2: one for each group."""
    found = Work()
    for group in held.groups if zero.stage in (1, 2) else ():
        ranks = shard_ranks(given, apart=group[0].apart)
        found[_over_shard("all_gather", padded(num_elements(group), ranks) * zero.element_bytes, given, group[0])] += 1
    return _sent(found)


def tied_sums(held: HeldStage, zero: ZeroSettings) -> Work:
    """Return the all-reduces of gradients of parameters of which several pipeline stages hold copies."""
    return Work(
        Collective("all_reduce", "tied", one.numel * zero.accumulated_bytes, stages) for one, stages in held.tied
    )


def _over_shard(kind: CollectiveKind, num_bytes: int, given: PlanInput, parameter: HeldParameter) -> Collective:
    axis = EXPERT_SHARD if parameter.apart else SHARD
    return Collective(kind, axis, num_bytes, shard_ranks(given, apart=parameter.apart))


def _sent(work: Work) -> Work:
    """Return the collectives of several ranks."""
    return Work({one: count for one, count in work.items() if isinstance(one, Collective) and one.ranks > 1})


def _of_flat_sums(given: PlanInput, held: HeldStage, zero: ZeroSettings) -> Work:
    """Return the all-reduces of bf16 at stage 1: flat gradients of each group, in parts of a bucket's size."""
    found = Work()
    for group in held.groups:
        total = padded(num_elements(group), shard_ranks(given, apart=group[0].apart))
        parts, rest = divmod(total, zero.reduce_bucket_size)
        sizes = [zero.reduce_bucket_size] * parts + [rest] * (rest > 0)
        found.update(_over_shard("all_reduce", size * zero.reduced_bytes, given, group[0]) for size in sizes)
    return _sent(found)


def _of_stage_0(given: PlanInput, held: HeldStage, zero: ZeroSettings) -> Work:
    """Return those of stage 0: gradients in the order of the module; a bucket is full once it exceeds its size."""
    found = Work()
    for apart in (False, True):
        own = [one for one in held.trained if one.apart == apart]
        for bucket in _filled([one.numel for one in own], zero.reduce_bucket_size):
            found[_over_shard("all_reduce", bucket * zero.reduced_bytes, given, own[0])] += 1
    return _sent(found)


def _filled(sizes: Iterable[int], limit: int) -> Iterator[int]:
    """Yield the sizes of buckets that are closed once they hold more than `limit` elements."""
    total = 0
    for size in sizes:
        total += size
        if total > limit:
            yield total
            total = 0
    if total:
        yield total


def _reduction_order(
    held: HeldStage, zero: ZeroSettings, traces: Sequence[LayerTrace] | None
) -> Sequence[HeldParameter]:
    """Return gradients in the order in which stages 1 and 2 reduce them.

    At stage 1 that is the order of the groups after the last backward pass, unless communication overlaps with it. In
    other cases gradients are reduced as they appear.
    """
    if zero.stage == 1 and not zero.overlap_comm:
        return [one for group in held.groups for one in group]
    return gradient_order(held, traces)


def _buckets(order: Sequence[HeldParameter], zero: ZeroSettings) -> Iterator[list[HeldParameter]]:
    """Yield the buckets of stages 1 and 2: none is larger than its size, but for a single larger gradient."""
    bucket: list[HeldParameter] = []
    for one in order:
        if bucket and num_elements(bucket) + one.numel > zero.reduce_bucket_size:
            yield bucket
            bucket = []
        bucket.append(one)
    if bucket:
        yield bucket


def _of_bucket(given: PlanInput, held: HeldStage, bucket: Sequence[HeldParameter], zero: ZeroSettings) -> Work:
    """Return the communication of a bucket of stage 1 or 2.

    Gradients of experts and others in one bucket are reduced apart. A gradient that is larger than a bucket is cut at
    the borders of ZeRO's partitions. Without `use_multi_rank_bucket_allreduce` each partition is reduced to its rank,
    which counts as the broadcast that it mirrors.
    """
    found = Work()
    if not (zero.contiguous_gradients and zero.reduce_scatter):
        return _sent(Work([_over_shard("all_reduce", num_elements(bucket) * zero.reduced_bytes, given, bucket[0])]))
    for apart in (False, True):
        own = [one for one in bucket if one.apart == apart]
        if not own:
            continue
        slices = [part for one in own for part in _slices(given, held, one)]
        if zero.use_multi_rank_bucket_allreduce:
            merged = _filled([size for _, size in slices], zero.reduce_bucket_size)
            found.update(_over_shard("all_reduce", size * zero.reduced_bytes, given, own[0]) for size in merged)
            continue
        for rank in sorted({rank for rank, _ in slices}):
            sizes = _filled([size for to, size in slices if to == rank], zero.reduce_bucket_size)
            found.update(_over_shard("broadcast", size * zero.reduced_bytes, given, own[0]) for size in sizes)
    return _sent(found)


def _slices(given: PlanInput, held: HeldStage, parameter: HeldParameter) -> list[tuple[int, int]]:
    """Return the parts of a parameter in ZeRO's partitions: index of the data rank, and number of elements."""
    group = next(group for group in held.groups if parameter in group)
    ranks = shard_ranks(given, apart=parameter.apart)
    partition = padded(num_elements(group), ranks) // ranks
    begin = num_elements(group[: group.index(parameter)])
    end, found = begin + parameter.numel, []
    while begin < end:
        stop = min(end, (begin // partition + 1) * partition)
        found.append((begin // partition, stop - begin))
        begin = stop
    return found
