"""Seconds of a training step by part, from the traces of its layers, rooflines, links and the pipeline's timetable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt

from megatron_ds.planner.held_parameters import HeldStage
from megatron_ds.planner.operations import Attention, LayerTrace, Product, Work
from megatron_ds.planner.pipeline.stragglers import Jitter
from megatron_ds.planner.pipeline.timetable import StageTimes, Timetable, simulate, slowdown
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.profiles.network import Network
from megatron_ds.planner.timing.engine_work import machine_of, step_of
from megatron_ds.planner.timing.pass_time import Machine, PassTime, pass_time
from megatron_ds.planner.timing.step_work import StageWork, StepWork
from megatron_ds.planner.trace import trace_layers

STRAGGLING = 0.006
"""Standard deviation of the speed of nodes, relative to their mean. A step waits for the slowest of them.

MegaScale (Jiang et al. 2024, section 5) and Llama 3 (section 3.3.4) report single slow nodes; the number is fitted to
published runs of 8 to 12,288 devices, see docs/planning.md.
"""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, on the pipeline rank that computes longest; they add up to `total_s`.

    Attributes:
        compute_s: forward and backward passes of all micro-batches, without recomputation.
        recompute_s: repeated parts of forward passes.
        exposed_s: communication that is waited for, or that slows down computation, by axis.
        bubble_s: waiting for other stages.
        optimizer_s: norms of gradients, and updates of weights.
        straggling_s: waiting for the slowest node, or for devices and passes that are slow at random.
        data_s: see `StepWork`.
        pause_s: waiting for checkpoints, on average.
        timetable: of the pipeline.
        tokens_per_s: of all ranks.
        mfu: model FLOPs as a share of the peak, attention counted in full; `hfu`: with recomputed ones.
    """

    compute_s: float
    recompute_s: float
    exposed_s: Mapping[str, float]
    bubble_s: float
    optimizer_s: float
    straggling_s: float
    data_s: float
    pause_s: float
    timetable: Timetable
    tokens_per_s: float
    mfu: float
    hfu: float

    @property
    def parts(self) -> Mapping[str, float]:
        """Seconds by part, those of communication by axis; parts without time are left out."""
        parts = {
            "compute": self.compute_s,
            "recomputation": self.recompute_s,
            **{f"communication ({axis})": value for axis, value in self.exposed_s.items()},
            "pipeline bubble": self.bubble_s,
            "optimizer": self.optimizer_s,
            "slowest node": self.straggling_s,
            "data": self.data_s,
            "checkpoints": self.pause_s,
        }
        return {name: value for name, value in parts.items() if value != 0 or name == "compute"}

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())


def plan_time(
    given: PlanInput,
    device: Device,
    network: Network,
    traces: Sequence[LayerTrace] | None = None,
    held: Mapping[int, HeldStage] | None = None,
    jitter: Jitter | None = None,
) -> StepTime:
    """Return the seconds of a step of a run.

    Does not communicate.

    Args:
        given: the run.
        device: profile of its devices.
        network: links between them.
        traces: of all layers of the model, in order; None = they are traced here.
        held: index of a pipeline stage -> its parameters; missing ones are found here.
        jitter: see `time_step`.
    """
    found = traces if traces is not None else trace_layers(given.layers, given.trace_setting())
    return time_step(step_of(given, found, held), machine_of(given, device, network), jitter)


def time_step(step: StepWork, machine: Machine, jitter: Jitter | None = None) -> StepTime:
    """Return the seconds of a step.

    Args:
        step: its work.
        machine: the devices.
        jitter: their random slowness; None = that of nodes, `STRAGGLING`.
    """
    passes = _Passes(machine)
    stages = [passes.of_stage(stage) for stage in step.stages]
    table = simulate(
        [StageTimes(one.forward.total_s, one.backward.total_s) for one in stages],
        step.num_micro_batches,
        step.schedule,
        num_chunks=len(stages) // step.num_ranks,
        message_s=[pass_time(stage.sends, machine).total_s for stage in step.stages[:-1]],
        blocking=step.blocks,
    )
    rank = max(range(step.num_ranks), key=lambda one: table.busy_s[one])
    mine = stages[rank :: step.num_ranks]
    passing = _total(one.forward + one.backward for one in mine).times(step.num_micro_batches)
    again_s = _total(one.recompute for one in mine).compute_s * step.num_micro_batches
    end, optimizer_s = _slowest_end(step, stages, machine)
    waited = {axis: value for axis, value in (passing + end).exposed_s.items() if value}
    if table.message_s[rank]:
        waited["pipeline"] = waited.get("pipeline", 0.0) + table.message_s[rank]
    bubble_s = table.duration_s - passing.total_s - table.message_s[rank]
    before_s = table.duration_s + end.total_s + optimizer_s
    pause_s = pass_time(step.saved, machine).total_s / step.save_every
    straggling_s = _straggling_s(step, table, before_s, jitter)
    total_s = before_s + straggling_s + step.data_s + pause_s
    pipelines = step.world_size // step.num_ranks * step.num_micro_batches
    useful, repeated = (pipelines * number for number in _flops(step))
    peak = machine.device.peak_flops(step.dtype) * step.world_size * total_s
    return StepTime(
        compute_s=passing.compute_s - again_s,
        recompute_s=again_s,
        exposed_s=waited,
        bubble_s=max(0.0, bubble_s),
        optimizer_s=optimizer_s,
        straggling_s=straggling_s,
        data_s=step.data_s,
        pause_s=pause_s,
        timetable=table,
        tokens_per_s=step.tokens / total_s,
        mfu=useful / peak,
        hfu=(useful + repeated) / peak,
    )


def _straggling_s(step: StepWork, table: Timetable, step_s: float, jitter: Jitter | None) -> float:
    """Return the seconds by which random slowness lengthens a step: its passes, or all of it by the default."""
    if jitter is None:
        return STRAGGLING * sqrt(2 * log(step.nodes)) * step_s
    return max(0.0, slowdown(table, jitter) - 1) * table.duration_s


@dataclass(frozen=True)
class _StageTime:
    forward: PassTime
    backward: PassTime
    recompute: PassTime


class _Passes:
    """Times of layers; equal layers share their passes, which are timed once."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._known: dict[tuple[int, ...], _StageTime] = {}

    def of_stage(self, stage: StageWork) -> _StageTime:
        layers = [self._of_layer(layer) for layer in stage.layers]
        backward = _total(one.backward for one in layers) + pass_time(stage.gradients, self.machine)
        return _StageTime(_total(one.forward for one in layers), backward, _total(one.recompute for one in layers))

    def _of_layer(self, layer: LayerTrace) -> _StageTime:
        each = layer.forward, layer.backward, layer.recompute
        key = tuple(map(id, each))
        if key not in self._known:
            self._known[key] = _StageTime(*(pass_time(work, self.machine) for work in each))
        return self._known[key]


def _slowest_end(step: StepWork, stages: Sequence[_StageTime], machine: Machine) -> tuple[PassTime, float]:
    """Return the communication at the end of the step of the rank that takes longest, and the seconds of its update."""
    found = []
    for rank, end in step.ends.items():
        mine = stages[rank :: step.num_ranks]
        hides_s = sum(one.forward.compute_s + one.backward.compute_s for one in mine) * end.hiding
        found.append((pass_time(end.sent, machine, hides_s), pass_time(end.update, machine).total_s + end.host_s))
    return max(found, key=lambda one: one[0].total_s + one[1])


def _flops(step: StepWork) -> tuple[float, float]:
    """Return the FLOPs of a micro-batch on the ranks of a pipeline, without recomputation, and of recomputation.

    As in `monitor.model_flops_per_token`, attention counts in full, causal or not, and twice as much backward.
    """
    known: dict[int, tuple[float, float]] = {}
    useful = repeated = 0.0
    for stage in step.stages:
        for layer in stage.layers:
            if id(layer) not in known:
                again = _full_flops(layer.recompute)
                known[id(layer)] = _full_flops(layer.forward) + _full_flops(layer.backward) - again, again
            useful += known[id(layer)][0]
            repeated += known[id(layer)][1]
    return useful, repeated


def _full_flops(work: Work) -> float:
    found = 0.0
    for one, count in work.items():
        if isinstance(one, Product):
            found += count * one.flops
        elif isinstance(one, Attention):
            pairs = one.rows * one.heads * one.queries * one.keys
            found += count * (8 if one.backward else 4) * one.head_dim * pairs
    return found


def _total(each: Iterable[PassTime]) -> PassTime:
    found = PassTime()
    for one in each:
        found += one
    return found
