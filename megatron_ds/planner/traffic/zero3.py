"""Gathers of weights and reductions of gradients by DeepSpeed 0.19.8 at ZeRO-3, where a weight is divided over ranks.

A module's weights are gathered before its forward and its backward pass, with those of modules that run next, and
released after it unless they are needed again soon. How often a weight is gathered follows from the order in which
modules run, and from the limits of DeepSpeed's settings: `WeightSchedule` replays one micro-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ds.planner.held_parameters import HeldParameter, HeldStage
from megatron_ds.planner.operations import Collective, LayerTrace, Work
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.traffic.gradients import EXPERT_SHARD, SHARD, gradient_order, shard_ranks
from megatron_ds.planner.traffic.module_passes import Event, ModulePass
from megatron_ds.planner.zero_settings import ZeroSettings

HPZ = "hpz"
"""The ranks of a node that hold a second division of the weights; see `zero_hpz_partition_size`."""


@dataclass
class _Weight:
    """A divided weight during the replay.

    Attributes:
        parameter: the weight.
        stays: it is gathered after the step, and kept.
        gathered: its complete value is there, or on its way.
        users: modules that use it.
        fetched_for: index of the last use, in the order of modules, that a fetch has seen.
        has_second: ranks of a node hold a second division of it (`zero_hpz_partition_size`).
    """

    parameter: HeldParameter
    stays: bool
    gathered: bool = False
    users: set[str] = field(default_factory=set)
    fetched_for: int = -1
    has_second: bool = False


@dataclass(frozen=True)
class Gather:
    """Weights that are gathered in one call or one after another.

    Attributes:
        parameters: the weights.
        second: from their division over the ranks of a node.
    """

    parameters: tuple[HeldParameter, ...]
    second: bool


class WeightSchedule:
    """The fetches and releases of a rank's weights in a micro-batch, once DeepSpeed knows the order of modules.

    DeepSpeed records this order in a run's first micro-batch, and decides in the second one what it releases when; it
    repeats these decisions in all others. In the second one of a step the small weights that stay gathered are not
    there yet.

    Args:
        zero: DeepSpeed's settings.
        weights: all of the stage, in the order of the module.
        used: module -> its own weights.
        passes: in the order in which they happen in a micro-batch.
        num_micro_batches: of a step.

    Attributes:
        gathers: of the last micro-batch that was replayed.
        most_live: the most elements of gathered weights in it, without those that stay gathered.
    """

    def __init__(
        self,
        zero: ZeroSettings,
        weights: Sequence[HeldParameter],
        used: Mapping[str, tuple[HeldParameter, ...]],
        passes: Sequence[ModulePass],
        num_micro_batches: int,
    ) -> None:
        self._zero, self._passes = zero, passes
        kept = {one.name for one in persistent(weights, zero)}
        self._weights = {one.name: _Weight(one, one.name in kept, gathered=one.name in kept) for one in weights}
        order = {name: index for index, name in enumerate(self._weights)}
        self._used = {name: [self._weights[one.name] for one in own] for name, own in used.items()}
        self._modules = [one.module for one in passes if one.event == Event.BEFORE]
        self._uses = [
            (weight, step)
            for step, module in enumerate(self._modules)
            for weight in sorted(self._of(module), key=lambda one: order[one.parameter.name])
        ]
        self.gathers: list[Gather] = []
        self._released: dict[tuple[str, int], frozenset[str]] = {}
        for name in kept if num_micro_batches > 1 else ():
            self._weights[name].gathered = False
        self.run()
        for weight in self._weights.values():
            weight.gathered, weight.has_second = weight.stays, False

    def run(self) -> list[Gather]:
        """Replay a micro-batch; return its gathers. Weights are then as they were before it."""
        self.gathers, self.most_live, self._live, self._step, self._queue = [], 0, 0, 0, deque(self._uses)
        for weight in self._weights.values():
            weight.fetched_for = -1
        for one in self._passes:
            if one.event == Event.BEFORE:
                self._fetch(one.module)
            else:
                self._release(one.module)
        for weight in self._weights.values():  # those of modules whose inputs have no gradients
            weight.users.clear()
            self._drop(weight)
        return self.gathers

    def _of(self, module: str) -> list[_Weight]:
        return self._used.get(module, [])

    def _fetch(self, module: str) -> None:
        own = self._of(module)
        self._gather(own)
        for weight in own:
            weight.users.add(module)
        missing = {weight.parameter.name for weight in own if weight.fetched_for < self._step}
        taken: set[str] = set()
        while self._queue and len(taken) < len(missing):
            weight, step = self._queue.popleft()
            weight.fetched_for = step
            taken.add(weight.parameter.name)
        assert taken == missing, (module, taken, missing)
        self._prefetch()
        self._step += 1

    def _prefetch(self) -> None:
        limit = min(self._zero.max_live_parameters - self._live, self._zero.prefetch_bucket_size)
        chosen: dict[str, _Weight] = {}
        while self._queue and sum(one.parameter.numel for one in chosen.values()) < limit:
            weight, step = self._queue.popleft()
            weight.fetched_for = max(weight.fetched_for, step)
            if not weight.gathered:
                chosen[weight.parameter.name] = weight
        self._gather(chosen.values())

    def _gather(self, weights: Iterable[_Weight]) -> None:
        missing = [one for one in weights if not one.gathered]
        for second in (False, True):
            for apart in (False, True):
                own = [one for one in missing if one.has_second == second and one.parameter.apart == apart]
                if own:
                    self.gathers.append(Gather(tuple(one.parameter for one in own), second))
        for one in missing:
            one.gathered = True
            self._live += one.parameter.numel
        self.most_live = max(self.most_live, self._live)

    def _release(self, module: str) -> None:
        if (module, self._step) not in self._released:
            self._released[module, self._step] = self._unneeded(module)
        for weight in self._of(module):
            weight.users.discard(module)
            if weight.parameter.name in self._released[module, self._step]:
                self._drop(weight)

    def _unneeded(self, module: str) -> frozenset[str]:
        """Return a module's weights of which no fetch has seen a later use, and which the next modules do not use."""
        soon = self._needed_soon()
        names = (one.parameter.name for one in self._of(module) if one.fetched_for <= self._step)
        return frozenset(name for name in names if name not in soon)

    def _needed_soon(self) -> set[str]:
        """Return the weights of the next modules, up to `max_reuse_distance` elements."""
        found: set[str] = set()
        passed = 0
        for module in self._modules[self._step :]:
            if passed >= self._zero.max_reuse_distance:
                break
            for weight in self._of(module):
                found.add(weight.parameter.name)
                passed += weight.parameter.numel
        return found

    def _drop(self, weight: _Weight) -> None:
        if weight.gathered and not weight.stays and not weight.users:
            weight.gathered = False
            weight.has_second = self._zero.hpz > 1
            self._live -= weight.parameter.numel


def persistent(weights: Sequence[HeldParameter], zero: ZeroSettings) -> list[HeldParameter]:
    """Return the weights that are small enough to stay gathered between steps, and few enough."""
    found: list[HeldParameter] = []
    total = 0
    for one in weights:
        if one.numel <= zero.param_persistence_threshold and one.numel + total <= zero.model_persistence_threshold:
            found.append(one)
            total += one.numel
    return found


def divided_numel(parameter: HeldParameter, ranks: int) -> int:
    """Return the number of elements of a weight that is divided over ranks, padding included."""
    return -(-parameter.numel // ranks) * ranks


def weight_gathers_of_passes(
    given: PlanInput, held: HeldStage, zero: ZeroSettings, passes: Sequence[ModulePass]
) -> Work:
    """Return the gathers of weights in the passes of a step, and of those that are kept, after the update.

    Args:
        given: the run.
        held: the only stage.
        zero: DeepSpeed's settings.
        passes: of modules, in a micro-batch.
    """
    schedule = WeightSchedule(zero, held.parameters, held.used, passes, given.num_micro_batches)
    first = _gathered(given, zero, schedule.run())
    again = _gathered(given, zero, schedule.run()) if given.num_micro_batches > 1 else Work()
    found = first + again.times(given.num_micro_batches - 1)
    for one in persistent(held.parameters, zero):
        found += _gathered(given, zero, [Gather((one,), second=False)])
    return found


def _gathered(given: PlanInput, zero: ZeroSettings, gathers: Iterable[Gather]) -> Work:
    """Return the collectives of gathers: one for all weights of a gather, or one for each."""
    found = Work()
    for gather in gathers:
        apart = gather.parameters[0].apart
        axis, ranks = (EXPERT_SHARD if apart else SHARD), shard_ranks(given, apart=apart)
        sizes = [divided_numel(one, ranks) * zero.element_bytes for one in gather.parameters]
        if ranks == 1:
            continue
        if gather.second:
            axis, ranks = HPZ, zero.hpz
        coalesced = len(sizes) > 1 and not zero.allgather_sequential
        if coalesced and zero.use_all_reduce_for_fetch_params and not gather.second:
            found[Collective("all_reduce", axis, sum(sizes), ranks)] += 1
            continue
        found.update(Collective("all_gather", axis, size, ranks) for size in ([sum(sizes)] if coalesced else sizes))
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
