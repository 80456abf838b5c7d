"""The search of layouts by the planner's own memory and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from megatron_ds.config import RunConfig
from megatron_ds.errors import MegatronDSError
from megatron_ds.hf.config import HFModel
from megatron_ds.parallel.grid import Layout
from megatron_ds.planner.held_parameters import HeldStage, hold_stage
from megatron_ds.planner.memory.stage import plan_memory
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.plan_input import Machines, PlanInput
from megatron_ds.planner.profiles import Device, Network
from megatron_ds.planner.search.branch_and_bound import (
    Estimate,
    Estimator,
    FoundLayout,
    Limits,
    SearchResult,
    search_layouts,
)
from megatron_ds.planner.search.floors import CERTAIN_S, LayoutFloors, both_passes
from megatron_ds.planner.search.model_traces import ModelTraces
from megatron_ds.planner.search.space import EVERYTHING, Candidate, Space, with_candidate
from megatron_ds.planner.timing.engine_work import machine_of, step_of
from megatron_ds.planner.timing.pass_time import Machine
from megatron_ds.planner.timing.step_time import time_step
from megatron_ds.runtime.setup import EnginePlan, plan_run

LEAST_GAIN = 0.01
"""Share of a step's time that `train.compile` saves at least where a search chooses it: each start compiles again."""


@dataclass(frozen=True)
class SearchInput:
    """A run, and the machines and profiles that layouts are searched for.

    Attributes:
        run: the run, with its model's directory.
        hf: its model.
        given: the input of the plan of any layout of it; the search changes its engine.
        device, network: profiles.
    """

    run: RunConfig
    hf: HFModel
    given: PlanInput
    device: Device
    network: Network

    @property
    def machines(self) -> Machines:
        """The machines."""
        return self.given.machines

    def without_compilation(self) -> SearchInput:
        """Return the same for the run without `train.compile`."""
        run = self.run.model_copy(update={"train": self.run.train.model_copy(update={"compile": False})})
        engine = plan_run(run, self.hf, self.machines.world_size, self.machines.device_type)
        return replace(self, run=run, given=self.given.with_engine(engine))


def find_layouts(
    searched: SearchInput,
    limits: Limits,
    varies: frozenset[str] = EVERYTHING,
    num_found: int = 5,
    *,
    offload: bool = True,
    compiles: bool = False,
) -> SearchResult:
    """Return the fastest layouts that fit.

    Args:
        searched: the run and the machines.
        limits: memory of a rank.
        varies: fields of `Candidate` that may differ from the run's.
        num_found: number of layouts; those that differ in settings alone count once.
        offload: whether optimizer state and weights may be moved to the host if nothing fits otherwise.
        compiles: whether `train.compile` is chosen too: it is tried on the layouts that are the fastest without it,
            because a trace of compiled blocks takes seconds.

    Raises:
        ConfigError: no layout fits.
        TopologyError: no layout is legal.
    """
    if compiles:
        searched = searched.without_compilation()
    machines, shape = searched.machines, searched.hf.core.shape()
    space = Space(searched.run, shape, machines.world_size, machines.ranks_per_node, varies, offload)
    estimators = PlannedEstimators(searched, space, limits)
    result = search_layouts(space, searched.hf, machines.device_type, estimators.ordered, limits, num_found)
    return _compiled_where_faster(result, estimators, limits) if compiles else result


def _compiled_where_faster(result: SearchResult, estimators: PlannedEstimators, limits: Limits) -> SearchResult:
    """Return found layouts with `train.compile` where that fits and gains time that is worth the compilation."""
    found = [estimators.compiled(one, limits) or one for one in result.found]
    return replace(result, found=tuple(sorted(found, key=lambda one: one.estimate.step_s)))


class PlannedEstimators:
    """Estimates of candidates: a bound from few traces, bounds from the candidate's own traces, and its plan.

    Args:
        searched: the run and the machines.
        space: the candidates.
        limits: memory of a rank.
    """

    def __init__(self, searched: SearchInput, space: Space, limits: Limits) -> None:
        self._searched, self._space, self._limits = searched, space, limits
        setting = searched.given.trace_setting()
        alone = replace(setting, micro_batch_size=1)
        self._traces = ModelTraces(searched.given.layers, alone)
        self._held: dict[tuple[int, ...], HeldStage] = {}
        self._machines: dict[tuple[Layout, int, int], Machine] = {}
        self._known: dict[Candidate, PlanInput] = {}
        self._bounds: dict[Candidate, Estimate] = {}
        self._seconds: dict[Candidate, float] = {}

    @property
    def ordered(self) -> list[Estimator]:
        """The estimators from the cheapest to the exact one, none of which says more than the next."""
        return [self.floor, self.floor.of_tensor, self.traced, self.timed, self.exact]

    @cached_property
    def floor(self) -> LayoutFloors:
        """The cheapest bound."""
        searched, axes = self._searched, {}
        for name in ("tensor", "context", "expert"):
            sizes = {getattr(layout, name) or 1 for layout in self._space.layouts()}
            axes[name] = min((size for size in sizes if size > 1), default=1)
        return LayoutFloors(searched.given, self._traces, searched.device, searched.network, axes)

    def traced(self, candidate: Candidate) -> Estimate:
        """Return a bound by the passes of the candidate's own layers, and what they keep."""
        if candidate not in self._bounds:
            self._bounds[candidate] = self._bound(candidate)
        return self._bounds[candidate]

    def _bound(self, candidate: Candidate) -> Estimate:
        given = self.given(candidate)
        traces, count = self._traces_of(given), given.num_micro_batches
        stages = self.floor.stages(candidate.pipeline)
        until_s = [0.0, *accumulate(both_passes(traces, self._machine(given)))]
        kept = [0, *accumulate(one.kept_bytes - one.released_bytes for one in traces)]
        passes_s = max(count * (until_s[stage.end] - until_s[stage.first]) + until_s[stage.first] for stage in stages)
        activations = [
            stage.in_flight(count) * (kept[stage.end] - kept[stage.first]) + _passing_bytes(traces[stage.end - 1])
            for stage in stages
        ]
        device, host = self.floor.memory(candidate, activations, count)
        return Estimate(passes_s + CERTAIN_S * self.floor.shards(candidate, passes_s), device, host)

    def timed(self, candidate: Candidate) -> Estimate:
        """Return the planned time; memory as `traced` has it."""
        given = self.given(candidate)
        last = given.layout.pipeline - 1
        held = {stage: self._hold(given, stage) for stage in {0, last // 2, last}}
        step = step_of(given, self._traces_of(given), held)
        self._seconds[candidate] = time_step(step, self._machine(given)).total_s
        return replace(self.traced(candidate), step_s=self._seconds[candidate])

    def exact(self, candidate: Candidate) -> Estimate:
        """Return the planned time and memory; what does not fit may need more memory than that."""
        given = self.given(candidate)
        step_s = self._seconds[candidate] if candidate in self._seconds else self.timed(candidate).step_s
        traces, device, host = self._traces_of(given), 0, 0
        for stage in self.fullest_stages(given, traces):
            memory = plan_memory(given, traces, stage, self._hold(given, stage))
            device, host = max(device, memory.peak_bytes), max(host, memory.host_bytes)
            if not self._limits.hold(Estimate(0.0, device, host)):
                break
        return Estimate(step_s, device, host)

    def fullest_stages(self, given: PlanInput, traces: Sequence[LayerTrace]) -> list[int]:
        """Return the stages of which one needs most memory.

        A stage in the middle needs no more than an earlier one in the middle that has at least as many layers of every
        kind, because it holds the activations of fewer micro-batches.
        """
        found, kinds = [0], list[Counter[str]]()
        stages = self.floor.stages(given.layout.pipeline)
        for number, stage in enumerate(stages[1:], start=1):
            kind = Counter(trace.like for trace in traces[stage.first : stage.end])
            if stage is stages[-1] or not any(kind <= earlier for earlier in kinds):
                found.append(number)
                kinds.append(kind)
        return found

    def compiled(self, layout: FoundLayout, limits: Limits) -> FoundLayout | None:
        """Return a layout with `train.compile`; None = `train` refuses it, it does not fit, or it gains too little."""
        candidate = replace(layout.candidate, compile=True)
        try:
            estimate = self.exact(candidate)
        except MegatronDSError:
            return None
        if not limits.hold(estimate) or estimate.step_s > (1 - LEAST_GAIN) * layout.estimate.step_s:
            return None
        return FoundLayout(candidate, estimate, with_candidate(layout.run, candidate))

    def _machine(self, given: PlanInput) -> Machine:
        """Return one device among the others; it depends on the layout alone."""
        key = (given.layout, given.expert_ranks, given.engine.context.ulysses)
        if key not in self._machines:
            self._machines[key] = machine_of(given, self._searched.device, self._searched.network)
        return self._machines[key]

    def _hold(self, given: PlanInput, stage: int) -> HeldStage:
        """Return the parameters of a stage, which depend on the layout alone."""
        key = (given.layout.tensor, given.layout.pipeline, given.layout.data, given.expert_ranks, stage)
        if key not in self._held:
            self._held[key] = hold_stage(given, stage)
        return self._held[key]

    def given(self, candidate: Candidate) -> PlanInput:
        """Return the input of the candidate's plan."""
        if candidate not in self._known:
            self._known[candidate] = self._searched.given.with_engine(self._engine(candidate))
        return self._known[candidate]

    def _traces_of(self, given: PlanInput) -> list[LayerTrace]:
        """Return the traces of the layers; stage 2 takes those of stage 3, which say more.

        Compiled ones differ: a graph does not have products of weights that stage 3 divides.
        """
        setting = given.trace_setting()
        alike = setting.zero_stage == 2 and not setting.compile
        return self._traces.of(replace(setting, zero_stage=3) if alike else setting)

    def _engine(self, candidate: Candidate) -> EnginePlan:
        searched, machines = self._searched, self._searched.machines
        run = with_candidate(searched.run, candidate)
        return plan_run(run, searched.hf, machines.world_size, machines.device_type)


def _passing_bytes(last: LayerTrace) -> int:
    """Return the bytes beyond kept ones that the last layer of a stage needs for its backward pass."""
    return last.backward_peak_bytes - last.kept_bytes
