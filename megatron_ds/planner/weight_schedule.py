"""Gathers and releases of ZeRO-3's weights by DeepSpeed 0.19.8: which weights are complete at every moment of a step.

A module's weights are gathered before its forward and its backward pass, with those of modules that run next, and
released after it unless they are needed again soon. How often a weight is gathered, and how long it is there, follow
from the order in which modules run and from the limits of DeepSpeed's settings. `WeightSchedule` replays them. Bytes on
the wire and memory are both derived from what it yields.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from megatron_ds.planner.held_parameters import HeldParameter
from megatron_ds.planner.moments import MODEL_BEGINS, MODEL_ENDS, MODEL_TURNS, Event, ModulePass, Moment
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.zero_settings import ZeroSettings


class Change(Enum):
    """A change of the weights that a rank has: their gather begins, is waited for, or they are released."""

    GATHER = "gather"
    ARRIVE = "arrive"
    RELEASE = "release"


@dataclass(frozen=True)
class WeightChange:
    """Weights whose state changes at once.

    Attributes:
        change: which one.
        weights: all of them; of one gather, those of experts and others.
        second: they are gathered from their division over the ranks of a node.
    """

    change: Change
    weights: tuple[HeldParameter, ...]
    second: bool = False


@dataclass
class _Weight:
    """A divided weight during the replay.

    Attributes:
        parameter: the weight.
        stays: it is gathered after the step, and kept.
        gathered: its complete value is there, or on its way.
        waits: it is on its way.
        users: modules that use it.
        steps: indices of its uses, in the order of modules.
        fetched_for: index of the last use that a fetch has seen.
        has_second: ranks of a node hold a second division of it (`zero_hpz_partition_size`).
    """

    parameter: HeldParameter
    stays: bool
    gathered: bool = False
    waits: bool = False
    users: set[str] = field(default_factory=set)
    steps: list[int] = field(default_factory=list)
    fetched_for: int = -1
    has_second: bool = False


class WeightSchedule:
    """The gathers and releases of a rank's weights in a micro-batch, once DeepSpeed knows the order of modules.

    DeepSpeed records this order in a run's first micro-batch, and decides in the second one what it releases when; it
    repeats these decisions in all others. In the second one of a step the small weights that stay gathered are not
    there yet.

    Args:
        zero: DeepSpeed's settings.
        weights: all of the stage, in the order of the module.
        used: module -> its own weights.
        passes: of a micro-batch, in the order in which they happen; see `module_passes`.
        num_micro_batches: of a step.
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
        modules = [one.module for one in passes if one.event == Event.BEFORE]
        self._uses, self._passed = list[tuple[_Weight, int]](), [0]
        for step, own in enumerate(self._used.get(module, []) for module in modules):
            self._uses += [(weight, step) for weight in sorted(own, key=lambda one: order[one.parameter.name])]
            self._passed.append(self._passed[-1] + sum(weight.parameter.numel for weight in own))
            for weight in own:
                weight.steps.append(step)
        self._released: dict[tuple[str, int], frozenset[str]] = {}
        self._replayed: dict[str, list[_Weight]] = {}  # module in its backward pass -> weights that it recomputes with
        self._begin()
        for name in kept if num_micro_batches > 1 else ():
            self._weights[name].gathered = False
        self.run()
        for weight in self._weights.values():
            weight.gathered, weight.has_second = weight.stays, False

    def run(self) -> list[WeightChange]:
        """Replay a micro-batch. Weights are then as they were before it."""
        return [*(change for one in self._passes for change in self.follow(one)), *self.end()]

    def follow(self, one: ModulePass) -> list[WeightChange]:
        """Replay one pass of a module."""
        if one == MODEL_BEGINS:
            self._begin()
        if one.event == Event.BEFORE:
            return list(self._fetch(one))
        return list(self._release(one))

    def end(self) -> list[WeightChange]:
        """Replay the end of a micro-batch, which releases the weights of modules whose inputs have no gradients."""
        self._replayed.clear()
        for weight in self._weights.values():
            weight.users.clear()
        return list(self._drop(self._weights.values()))

    def _begin(self) -> None:
        self._live, self._step, self._queue = 0, 0, deque(self._uses)
        for weight in self._weights.values():
            weight.fetched_for = -1

    # ---- before a module -----------------------------------------------------------------------------------------

    def _fetch(self, one: ModulePass) -> Iterator[WeightChange]:
        own = self._used.get(one.module, [])
        if one.backward:
            self._replayed[one.module] = []
        yield from self._gather(own)
        waiting = [weight for weight in own if weight.waits]
        if waiting:
            yield WeightChange(Change.ARRIVE, tuple(weight.parameter for weight in waiting))
        for weight in own:
            weight.waits = False
            weight.users.add(one.module)
            if self._replayed and not one.backward and not weight.parameter.trains:
                owner = next(reversed(self._replayed))
                self._replayed[owner].append(weight)
                weight.users.add(owner)
        missing = {weight.parameter.name for weight in own if weight.fetched_for < self._step}
        taken: set[str] = set()
        while self._queue and len(taken) < len(missing):
            weight, step = self._queue.popleft()
            weight.fetched_for = step
            taken.add(weight.parameter.name)
        assert taken == missing, (one, taken, missing)
        yield from self._prefetch()
        self._step += 1

    def _prefetch(self) -> Iterator[WeightChange]:
        limit = min(self._zero.max_live_parameters - self._live, self._zero.prefetch_bucket_size)
        chosen: dict[str, _Weight] = {}
        total = 0
        while self._queue and total < limit:
            weight, step = self._queue.popleft()
            weight.fetched_for = max(weight.fetched_for, step)
            if not weight.gathered and weight.parameter.name not in chosen:
                chosen[weight.parameter.name] = weight
                total += weight.parameter.numel
        yield from self._gather(chosen.values())

    def _gather(self, weights: Iterable[_Weight]) -> Iterator[WeightChange]:
        missing = [one for one in weights if not one.gathered]
        for second in (False, True):
            own = tuple(one.parameter for one in missing if one.has_second == second)
            if own:
                yield WeightChange(Change.GATHER, own, second)
        for one in missing:
            one.gathered = one.waits = True
            self._live += one.parameter.numel

    # ---- after a module ------------------------------------------------------------------------------------------

    def _release(self, one: ModulePass) -> Iterator[WeightChange]:
        own, key = self._used.get(one.module, []), (one.module, self._step)
        if key not in self._released:
            self._released[key] = self._unneeded(own)
        replayed = self._replayed.pop(one.module, []) if one.backward else []
        for weight in (*own, *replayed):
            weight.users.discard(one.module)
        yield from self._drop([*(weight for weight in own if weight.parameter.name in self._released[key]), *replayed])

    def _unneeded(self, own: Sequence[_Weight]) -> frozenset[str]:
        """Return a module's weights of which no fetch has seen a later use, and which the next modules do not use."""
        unseen = (one for one in own if one.fetched_for <= self._step)
        return frozenset(one.parameter.name for one in unseen if not self._is_needed_soon(one))

    def _is_needed_soon(self, weight: _Weight) -> bool:
        """Return whether one of the next modules uses a weight: up to `max_reuse_distance` elements."""
        following = bisect_left(weight.steps, self._step)
        if following == len(weight.steps):
            return False
        return self._passed[weight.steps[following]] - self._passed[self._step] < self._zero.max_reuse_distance

    def _drop(self, weights: Iterable[_Weight]) -> Iterator[WeightChange]:
        dropped = []
        for weight in weights:
            if weight.gathered and not weight.stays and not weight.users:
                weight.gathered = weight.waits = False
                weight.has_second = self._zero.hpz > 1
                self._live -= weight.parameter.numel
                dropped.append(weight.parameter)
        if dropped:
            yield WeightChange(Change.RELEASE, tuple(dropped))


def module_passes(traces: Sequence[LayerTrace]) -> list[ModulePass]:
    """Return the passes of all modules of a model in a micro-batch, in their order.

    Args:
        traces: of all layers, made for ZeRO-3.
    """
    forward = [one.within(trace.name) for trace in traces for one in _passes(trace.in_forward)]
    backward = [one.within(trace.name) for trace in reversed(traces) for one in _passes(trace.in_backward)]
    return [MODEL_BEGINS, *forward, MODEL_ENDS, MODEL_TURNS, *backward]


def _passes(moments: Iterable[Moment]) -> Iterator[ModulePass]:
    return (one.module_pass for one in moments if one.module_pass is not None)


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
