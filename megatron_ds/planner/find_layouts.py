"""The search of layouts by the planner's own memory and time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from megatron_ds.config import RunConfig
from megatron_ds.hf.config import HFModel
from megatron_ds.planner.engine_work import machine_of
from megatron_ds.planner.layout_floors import CERTAIN, LayoutFloors
from megatron_ds.planner.memory import plan_memory
from megatron_ds.planner.model_traces import ModelTraces
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.pass_time import Machine, pass_time
from megatron_ds.planner.plan_input import Machines, PlanInput
from megatron_ds.planner.profiles import Device, Network
from megatron_ds.planner.search import Estimate, Limits, SearchResult, search_layouts
from megatron_ds.planner.search_space import EVERYTHING, Candidate, Space, with_candidate
from megatron_ds.planner.step_time import plan_time
from megatron_ds.runtime.setup import EnginePlan, plan_run


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
    estimators = PlannedEstimators(searched, space)
    ordered = [estimators.floor, estimators.traced, estimators.exact]
    return search_layouts(space, searched.hf, machines.device_type, ordered, limits, num_found)


class PlannedEstimators:
    """Estimates of candidates: a bound from few traces, one from the candidate's own traces, and its plan.

    Args:
        searched: the run and the machines.
        space: the candidates.
    """

    def __init__(self, searched: SearchInput, space: Space) -> None:
        self._searched, self._space = searched, space
        setting = searched.given.trace_setting()
        alone = replace(setting, micro_batch_size=1)
        self._traces = ModelTraces(searched.given.layers, alone)
        self._bounds: dict[int, list[int]] = {}
        self._passes: dict[tuple[object, ...], list[float]] = {}
        self._engines: OrderedDict[Candidate, PlanInput] = OrderedDict()

    @cached_property
    def floor(self) -> LayoutFloors:
        """The cheapest bound."""
        searched, axes = self._searched, {}
        for name in ("tensor", "context", "expert"):
            sizes = {getattr(layout, name) or 1 for layout in self._space.layouts()}
            axes[name] = min((size for size in sizes if size > 1), default=1)
        return LayoutFloors(searched.given, self._traces, searched.device, searched.network, axes)

    def traced(self, candidate: Candidate) -> Estimate:
        """Return a bound by the passes of the candidate's own layers on its largest stage."""
        given, floor = self.given(candidate), self.floor(candidate)
        traces = self._traces.of(given.trace_setting())
        seconds = self._seconds_of(given, traces)
        stages = [sum(seconds[first:end]) for first, end in pairwise(self._stages(given))]
        count = given.num_micro_batches
        passes_s = max(count * stage_s + sum(stages[:index]) for index, stage_s in enumerate(stages))
        return Estimate(max(floor.step_s, CERTAIN * passes_s), floor.device_bytes, floor.host_bytes)

    def exact(self, candidate: Candidate) -> Estimate:
        """Return the planned time and memory."""
        searched, given = self._searched, self.given(candidate)
        traces, last = self._traces.of(given.trace_setting()), given.layout.pipeline - 1
        memory = [plan_memory(given, traces, stage) for stage in sorted({0, min(1, last), last})]
        device, host = max(one.peak_bytes for one in memory), max(one.host_bytes for one in memory)
        time = plan_time(given, searched.device, searched.network, traces)
        return Estimate(time.total_s, device, host)

    def given(self, candidate: Candidate) -> PlanInput:
        """Return the input of the candidate's plan."""
        if candidate not in self._engines:
            self._engines[candidate] = self._searched.given.with_engine(self._engine(candidate))
        return self._engines[candidate]

    def _engine(self, candidate: Candidate) -> EnginePlan:
        searched, machines = self._searched, self._searched.machines
        run = with_candidate(searched.run, candidate)
        return plan_run(run, searched.hf, machines.world_size, machines.device_type)

    def _stages(self, given: PlanInput) -> list[int]:
        pipeline = given.layout.pipeline
        if pipeline not in self._bounds:
            self._bounds[pipeline] = given.stage_bounds
        return self._bounds[pipeline]

    def _seconds_of(self, given: PlanInput, traces: list[LayerTrace]) -> list[float]:
        """Return the seconds of both passes of each layer."""
        machine = machine_of(given, self._searched.device, self._searched.network)
        found: dict[str, float] = {}
        for trace in traces:
            if trace.like not in found:
                found[trace.like] = _both_passes(trace, machine)
        return [found[trace.like] for trace in traces]


def _both_passes(trace: LayerTrace, machine: Machine) -> float:
    return pass_time(trace.forward, machine).total_s + pass_time(trace.backward, machine).total_s
