"""Seconds of a training step by part, from the traces of its layers, rooflines, links and the pipeline's timetable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log, sqrt

from megatron_ds.planner.operations import LayerTrace, Work
from megatron_ds.planner.pass_time import Machine, PassTime, pass_time
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.profiles.network import Network
from megatron_ds.planner.schedules import Schedule
from megatron_ds.planner.timetable import StageTimes, Timetable, simulate

STRAGGLING = 0.006
"""Standard deviation of the speed of nodes relative to their mean: a step waits for the slowest of them."""


@dataclass(frozen=True)
class StageWork:
    """The layers of a virtual pipeline stage, for one micro-batch.

    Attributes:
        layers: their traces.
        gradients: further work of its backward pass, such as sums of gradients.
        sends: what goes to the next stage, and comes back as a gradient; empty in the last one.
    """

    layers: Sequence[LayerTrace]
    gradients: Work = field(default_factory=Work)
    sends: Work = field(default_factory=Work)


@dataclass(frozen=True)
class StepWork:
    """A step of one pipeline.

    Attributes:
        stages: virtual stages in the model's order; stage s runs on rank s % p.
        num_ranks: p.
        num_micro_batches: m.
        schedule: of the pipeline.
        blocks: ranks wait for messages; False = these hide behind passes.
        sent: by rank, communication of a step beside the passes; hidden parts hide behind one micro-batch's passes.
        updates: by rank, computation of a step beside the passes: of the optimizer.
        tokens: of a step on all ranks.
        model_flops: of a step on all ranks, without recomputation.
        nodes: number of islands, one of which is the slowest.
        data_s: seconds of a step in which the devices wait for data.
        pause_s: seconds of a step in which they wait for checkpoints, on average.
    """

    stages: Sequence[StageWork]
    num_ranks: int
    num_micro_batches: int
    schedule: Schedule
    blocks: bool
    sent: Sequence[Work]
    updates: Sequence[Work]
    tokens: int
    model_flops: float
    world_size: int
    nodes: int = 1
    data_s: float = 0.0
    pause_s: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, on the rank that computes longest; they add up to `total_s`.

    Attributes:
        compute_s: forward and backward passes of all micro-batches, without recomputation.
        recompute_s: repeated parts of forward passes.
        exposed_s: communication that is waited for, or that slows down computation, by axis.
        bubble_s: waiting for other stages.
        optimizer_s: norms of gradients, and updates of weights.
        straggling_s: waiting for the slowest node.
        data_s, pause_s: see `StepWork`.
        timetable: of the pipeline.
        tokens_per_s: of all ranks.
        mfu: model FLOPs as a share of the peak; `hfu`: with recomputed ones.
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
        """Seconds by part, those of communication by axis."""
        sent = {f"communication ({axis})": value for axis, value in self.exposed_s.items() if value > 0}
        parts = {
            "compute": self.compute_s,
            "recomputation": self.recompute_s,
            **sent,
            "pipeline bubble": self.bubble_s,
            "optimizer": self.optimizer_s,
            "slowest node": self.straggling_s,
            "data": self.data_s,
            "checkpoints": self.pause_s,
        }
        return {name: value for name, value in parts.items() if value > 0 or name == "compute"}

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())


def plan_time(given: PlanInput, device: Device, network: Network) -> StepTime:
    """Return the seconds of a step of a run.

    Does not communicate.

    Args:
        given: the run.
        device: profile of its devices.
        network: links between them.
    """
    raise NotImplementedError


def time_step(step: StepWork, machine: Machine) -> StepTime:
    """Return the seconds of a step."""
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
    mine = _total(one.forward + one.backward for one in stages[rank :: step.num_ranks]).times(step.num_micro_batches)
    again = _total(one.recompute for one in stages[rank :: step.num_ranks]).times(step.num_micro_batches)
    ends = [_end(step, stages, one, machine) for one in range(step.num_ranks)]
    last, optimizer_s = max(ends, key=lambda end: end[0].total_s + end[1])
    exposed = (mine + last).exposed_s | {"pipeline": table.message_s[rank]}
    before_s = table.duration_s + last.total_s + optimizer_s
    straggling_s = STRAGGLING * sqrt(2 * log(step.nodes)) * before_s
    total_s = before_s + straggling_s + step.data_s + step.pause_s
    peak = machine.device.peak_flops("bfloat16") * step.world_size * total_s
    repeated = sum(layer.recompute.flops for stage in step.stages for layer in stage.layers) * step.num_micro_batches
    repeated *= step.world_size // step.num_ranks
    return StepTime(
        compute_s=mine.compute_s - again.compute_s,
        recompute_s=again.compute_s,
        exposed_s=exposed,
        bubble_s=table.bubble_s[rank],
        optimizer_s=optimizer_s,
        straggling_s=straggling_s,
        data_s=step.data_s,
        pause_s=step.pause_s,
        timetable=table,
        tokens_per_s=step.tokens / total_s,
        mfu=step.model_flops / peak,
        hfu=(step.model_flops + repeated) / peak,
    )


@dataclass(frozen=True)
class _StageTime:
    forward: PassTime
    backward: PassTime
    recompute: PassTime


class _Passes:
    """Times of layers; equal layers share a trace, which is timed once."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._known: dict[int, _StageTime] = {}

    def of_stage(self, stage: StageWork) -> _StageTime:
        layers = [self._of_layer(layer) for layer in stage.layers]
        backward = _total(one.backward for one in layers) + pass_time(stage.gradients, self.machine)
        return _StageTime(_total(one.forward for one in layers), backward, _total(one.recompute for one in layers))

    def _of_layer(self, layer: LayerTrace) -> _StageTime:
        if id(layer) not in self._known:
            each = layer.forward, layer.backward, layer.recompute
            self._known[id(layer)] = _StageTime(*(pass_time(work, self.machine) for work in each))
        return self._known[id(layer)]


def _end(step: StepWork, stages: Sequence[_StageTime], rank: int, machine: Machine) -> tuple[PassTime, float]:
    """Return the communication at the end of a rank's step, and the seconds of its update."""
    hides_s = sum(one.forward.compute_s + one.backward.compute_s for one in stages[rank :: step.num_ranks])
    return pass_time(step.sent[rank], machine, hides_s), pass_time(step.updates[rank], machine).compute_s


def _total(each: Iterable[PassTime]) -> PassTime:
    found = PassTime()
    for one in each:
        found += one
    return found
