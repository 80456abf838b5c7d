"""The search of layouts by the planner's own memory and time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from megatron_ds.config import RunConfig
from megatron_ds.hf.config import HFModel
from megatron_ds.parallel.grid import Layout
from megatron_ds.planner.held_parameters import HeldStage, hold_stage
from megatron_ds.planner.memory.stage import plan_memory
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.plan_input import Machines, PlanInput
from megatron_ds.planner.profiles import Device, Network
from megatron_ds.planner.search.branch_and_bound import Estimate, Estimator, Limits, SearchResult, search_layouts
from megatron_ds.planner.search.floors import CERTAIN_S, LayoutFloors, both_passes
from megatron_ds.planner.search.model_traces import ModelTraces
from megatron_ds.planner.search.space import EVERYTHING, Candidate, Space, with_candidate
from megatron_ds.planner.timing.engine_work import machine_of
from megatron_ds.planner.timing.pass_time import Machine
from megatron_ds.planner.timing.step_time import plan_time
from megatron_ds.runtime.setup import EnginePlan, plan_run

CERTAIN_ACTIVATIONS = 0.97
"""Share of the activations of a stage that its peak has at least."""


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


def find_layouts(
    searched: SearchInput,
    limits: Limits,
    varies: frozenset[str] = EVERYTHING,
    num_found: int = 5,
    *,
    offload: bool = True,
) -> SearchResult:
    """Return the fastest layouts that fit.

    Args:
        searched: the run and the machines.
        limits: memory of a rank.
        varies: fields of `Candidate` that may differ from the run's.
        num_found: number of layouts; those that differ in settings alone count once.
        offload: whether optimizer state and weights may be moved to the host if nothing fits otherwise.

    Raises:
        ConfigError: no layout fits.
        TopologyError: no layout is legal.
    """
    machines, shape = searched.machines, searched.hf.core.shape()
    space = Space(searched.run, shape, machines.world_size, machines.ranks_per_node, varies, offload)
    estimators = PlannedEstimators(searched, space, limits)
    ordered: list[Estimator] = [estimators.floor, estimators.floor.of_tensor, estimators.traced, estimators.exact]
    return search_layouts(space, searched.hf, machines.device_type, ordered, limits, num_found)


class PlannedEstimators:
    """Estimates of candidates: a bound from few traces, one from the candidate's own traces, and its plan.

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
        self._bounds: dict[int, list[int]] = {}
        self._held: dict[tuple[int, ...], HeldStage] = {}
        self._machines: dict[tuple[Layout, int, int], Machine] = {}
        self._known: dict[Candidate, PlanInput] = {}

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
        given, floor = self.given(candidate), self.floor(candidate)
        traces = self._traces_of(given)
        seconds = both_passes(traces, self._machine(given))
        bounds, count = list(pairwise(self._stages(given))), given.num_micro_batches
        stages = [sum(seconds[first:end]) for first, end in bounds]
        passes_s = max(count * stage_s + sum(stages[:index]) for index, stage_s in enumerate(stages))
        device = max(floor.device_bytes, self._kept_bytes(given, candidate, traces, bounds))
        step_s = passes_s + CERTAIN_S * self.floor.gradients_s(candidate)
        return Estimate(max(floor.step_s, step_s), device, floor.host_bytes)

    def _kept_bytes(
        self, given: PlanInput, candidate: Candidate, traces: list[LayerTrace], bounds: list[tuple[int, int]]
    ) -> int:
        """Return the least memory of the first and the last stage with the activations of their layers."""
        found = []
        for stage in {0, len(bounds) - 1}:
            layers = traces[slice(*bounds[stage])]
            in_flight = min(len(bounds) - stage, given.num_micro_batches)
            kept = in_flight * sum(one.kept_bytes - one.released_bytes for one in layers)
            last = layers[-1]
            found.append(kept + last.backward_peak_bytes - last.kept_bytes)
        return int(self.floor.held_bytes(candidate) + CERTAIN_ACTIVATIONS * max(found))

    def exact(self, candidate: Candidate) -> Estimate:
        """Return the planned time and memory; of what does not fit, the time is a bound."""
        searched, given = self._searched, self.given(candidate)
        traces, last = self._traces.of(given.trace_setting()), given.layout.pipeline - 1
        device = host = 0
        for stage in sorted({0, min(1, last), last}):
            memory = plan_memory(given, traces, stage, self._hold(given, stage))
            device, host = max(device, memory.peak_bytes), max(host, memory.host_bytes)
            if not self._limits.hold(Estimate(0.0, device, host)):
                return Estimate(self.traced(candidate).step_s, device, host)
        held = {stage: self._hold(given, stage) for stage in {0, last // 2, last}}
        time = plan_time(given, searched.device, searched.network, traces, held)
        return Estimate(time.total_s, device, host)

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
        """Return the traces of the layers without passes of modules; those of stages 2 and 3 are the same."""
        setting = given.trace_setting()
        return self._traces.of(replace(setting, zero_stage=min(2, setting.zero_stage)))

    def _engine(self, candidate: Candidate) -> EnginePlan:
        searched, machines = self._searched, self._searched.machines
        run = with_candidate(searched.run, candidate)
        return plan_run(run, searched.hf, machines.world_size, machines.device_type)

    def _stages(self, given: PlanInput) -> list[int]:
        pipeline = given.layout.pipeline
        if pipeline not in self._bounds:
            self._bounds[pipeline] = given.stage_bounds
        return self._bounds[pipeline]
