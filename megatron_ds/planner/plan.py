"""The plan of a run: memory of each stage, bytes on the wire, and time of a step; whether it fits, and what it costs.

One trace of the model's layers is what all three are computed from. A plan of a run file, of a candidate of the search
and of a published run are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_ds.planner.memory.stage import StageMemory, plan_memory
from megatron_ds.planner.model_size import ModelSize, model_size
from megatron_ds.planner.operations import LayerTrace
from megatron_ds.planner.pipeline.stragglers import RandomSlowness
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.profiles import Device, Network
from megatron_ds.planner.timing.step_time import StepTime, plan_time
from megatron_ds.planner.trace.layers import trace_layers
from megatron_ds.planner.traffic.wire import StepTraffic, plan_wire

GB = 10**9
HOUR_S, DAY_S = 3600, 86400


@dataclass(frozen=True)
class Plan:
    """A run on machines, planned.

    Attributes:
        given: the run and the machines.
        device: profile of the devices.
        network: that joins them.
        traces: of all layers, for one micro-batch.
        memory: of each pipeline stage.
        limit_bytes: memory of a device that the run may use.
        stragglers: random slowness of the devices; None = the usual one of nodes.
    """

    given: PlanInput
    device: Device
    network: Network
    traces: Sequence[LayerTrace]
    memory: tuple[StageMemory, ...]
    limit_bytes: int
    stragglers: RandomSlowness | None = None

    @cached_property
    def time(self) -> StepTime:
        """Time of a step."""
        jitter = self.stragglers.at(self.given.layout) if self.stragglers is not None else None
        return plan_time(self.given, self.device, self.network, self.traces, jitter=jitter)

    @cached_property
    def wire(self) -> tuple[StepTraffic, ...]:
        """Communication of a rank of each pipeline stage in a step."""
        stages = range(self.given.layout.pipeline)
        return tuple(plan_wire(self.given, stage, self.traces) for stage in stages)

    @cached_property
    def size(self) -> ModelSize:
        """Parameters of the model."""
        return model_size(self.given)

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs most memory on its devices."""
        return max(self.memory, key=lambda one: one.peak_bytes)

    @property
    def missing_bytes(self) -> int:
        """Memory that the fullest stage needs beyond the limit; 0 or less if the run fits."""
        return self.fullest.peak_bytes - self.limit_bytes

    @property
    def fits(self) -> bool:
        """The run fits the devices."""
        return self.missing_bytes <= 0

    def campaign(self, tokens: float, price: float | None, slowdown: float) -> Campaign:
        """Return time and cost of a training run over a number of tokens.

        Args:
            tokens: positions of all steps.
            price: of a device for an hour, in any currency; None = unknown.
            slowdown: by failures and saves; see `FaultPlan.slowdown`. It contains the pauses of saves.
        """
        steps = -(-tokens // self.given.tokens_per_step)
        seconds = steps * (self.time.total_s - self.time.pause_s) * slowdown
        return Campaign(tokens, int(steps), seconds, self.given.machines.world_size, price, slowdown)


@dataclass(frozen=True)
class Campaign:
    """A complete training run.

    Attributes:
        tokens: positions of all steps.
        steps: number of them.
        seconds: that they take.
        devices: number of them.
        price: of a device for an hour; None = unknown.
        slowdown: by failures and saves, which `seconds` contain; infinite = the run makes no progress.
    """

    tokens: float
    steps: int
    seconds: float
    devices: int
    price: float | None
    slowdown: float

    @property
    def device_hours(self) -> float:
        """Hours of all devices."""
        return self.seconds / HOUR_S * self.devices

    @property
    def cost(self) -> float | None:
        """Price of them."""
        return None if self.price is None else self.device_hours * self.price


def plan_stages(given: PlanInput, traces: Sequence[LayerTrace] | None = None) -> tuple[StageMemory, ...]:
    """Return the memory of each pipeline stage.

    Args:
        given: the run and the machines.
        traces: of all layers; None = they are traced here.
    """
    found = trace_layers(given.layers, given.trace_setting()) if traces is None else traces
    return tuple(plan_memory(given, found, stage) for stage in range(given.layout.pipeline))


def make_plan(
    given: PlanInput,
    device: Device,
    network: Network,
    limit_bytes: int | None = None,
    stragglers: RandomSlowness | None = None,
) -> Plan:
    """Plan a run.

    Args:
        given: the run and the machines.
        device: profile of the devices.
        network: that joins them.
        limit_bytes: memory of a device that the run may use; None = all that it has.
        stragglers: see `Plan`.
    """
    traces = trace_layers(given.layers, given.trace_setting())
    memory = plan_stages(given, traces)
    limit = device.memory_bytes if limit_bytes is None else limit_bytes
    return Plan(given, device, network, traces, memory, limit, stragglers)


def largest_parts(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    """Return the parts of a sum, the largest first; those of nothing are left out."""
    return sorted(((name, one) for name, one in parts.items() if one), key=lambda part: -part[1])
