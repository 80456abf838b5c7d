"""All that each rank sends in one training step, by axis and by kind: the traffic of the layers and of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_ds.planner.held_parameters import HeldStage
from megatron_ds.planner.operations import Collective, LayerTrace, Message, Work
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.traffic.engine import EngineTraffic, engine_traffic

MESSAGE = "message"
"""The kind of a `Message`, in tables."""


@dataclass(frozen=True)
class Sent:
    """Communication of one kind along one axis.

    Attributes:
        calls: number of collectives or messages.
        num_bytes: that the rank sends; exact.
    """

    calls: int
    num_bytes: Fraction


@dataclass(frozen=True)
class StepTraffic:
    """Communication of a rank in one step.

    Attributes:
        layers: of forward and backward passes of all micro-batches.
        engine: of the engine.
    """

    layers: Work
    engine: EngineTraffic

    @property
    def total(self) -> Work:
        """All of it."""
        return self.layers + self.engine.total

    @property
    def by_axis(self) -> Mapping[tuple[str, str], Sent]:
        """Calls and bytes by axis and kind, in the order of their names."""
        return table_of(self.total)


def plan_wire(given: PlanInput, stage: int, traces: Sequence[LayerTrace], held: HeldStage | None = None) -> StepTraffic:
    """Return the communication of a rank of a pipeline stage, in a step after the first two.

    Args:
        given: the run.
        stage: index of the pipeline stage.
        traces: of all layers of the model, in order, for one micro-batch.
        held: the stage's parameters; None = they are found by `hold_stage`.
    """
    first, end = given.stage_bounds[stage : stage + 2]
    layers = Work()
    for trace in traces[first:end]:
        layers.update(communication(trace.forward + trace.backward))
    return StepTraffic(layers.times(given.num_micro_batches), engine_traffic(given, stage, held, traces))


def communication(work: Work) -> Work:
    """Return the collectives and messages among operations."""
    return Work({one: count for one, count in work.items() if isinstance(one, Collective | Message)})


def table_of(work: Work) -> dict[tuple[str, str], Sent]:
    """Return calls and bytes of communication by axis and kind, in the order of their names."""
    found: dict[tuple[str, str], Sent] = {}
    for one, count in work.items():
        if isinstance(one, Collective | Message):
            key = (one.axis, one.kind if isinstance(one, Collective) else MESSAGE)
            before = found.get(key, Sent(0, Fraction(0)))
            found[key] = Sent(before.calls + count, before.num_bytes + one.sent_bytes * count)
    return dict(sorted(found.items()))
