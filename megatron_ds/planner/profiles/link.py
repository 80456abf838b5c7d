"""Links between ranks as alpha-beta models: what one step of a ring takes, by the bytes of its chunk.

A ring of n ranks moves a buffer of S bytes in chunks of S/n: an all-reduce takes 2 (n - 1) steps, an all-gather or a
reduce-scatter n - 1 (Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH"). One step of a
chunk of c bytes takes

    step_us + fill_us * c / (c + fill_mb) + c / gb_s

The middle term is the time to fill and drain the pipeline inside a chunk: small messages are sent by NCCL's protocol
with low latency, large ones by the one with high bandwidth and more synchronisation. A switch that sums (NVLink SHARP)
moves the buffer once, whatever the number of ranks: its time has the same form with S in the place of the chunk.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_ds.config.schema_base import Count, Section

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
MeasuredKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "message"]

US, GB, MB = 1e-6, 1e9, 1e6


def as_tuple(value: object) -> object:
    """Return a list as a tuple: YAML has lists, and a frozen model tuples."""
    return tuple(value) if isinstance(value, list) else value


class Steps(Section):
    """Time of one step; see the module.

    Attributes:
        base_us: of a collective, before its first step.
        step_us: of a step of an empty chunk.
        fill_us: further time of a step of a large chunk.
        fill_mb: chunk (10^6 bytes) at which half of it is due.
        gb_s: 10^9 bytes per second in one direction that arrive at one rank.
    """

    base_us: NotNegative
    step_us: NotNegative
    fill_us: NotNegative = 0.0
    fill_mb: Positive = 1.0
    gb_s: Positive

    def latency_s(self, num_bytes: float) -> float:
        """Return the seconds of one step of a chunk beyond those of its bytes."""
        return (self.step_us + self.fill_us * num_bytes / (num_bytes + self.fill_mb * MB)) * US

    def step_s(self, num_bytes: float) -> float:
        """Return the seconds of one step of a chunk."""
        return self.latency_s(num_bytes) + num_bytes / (self.gb_s * GB)


class Latency(Section):
    """`Steps` of a kind of network card, without a bandwidth."""

    base_us: NotNegative
    step_us: NotNegative
    fill_us: NotNegative = 0.0
    fill_mb: Positive = 1.0


class MeasuredTime(Section):
    """Median time of a collective or message on this machine.

    Attributes:
        kind: of it.
        axis: the only axis whose ranks communicate in this way; None = all that have no rows of their own.
        ranks: that took part.
        num_bytes: see `planner.operations.Collective.num_bytes`.
        us: microseconds.
    """

    kind: MeasuredKind
    axis: str | None = None
    ranks: Count
    num_bytes: Count
    us: Positive


class Link(Section):
    """A kind of link between ranks.

    Attributes:
        source: of the numbers: data sheets, papers, measurements.
        ring: steps of collectives in rings.
        summing: steps of an all-reduce in the switches, of the complete buffer; None = they cannot sum.
        has_trees: an all-reduce over many islands may use trees.
        message: steps of a message between two ranks; None = as `ring`.
        measured: times that are preferred to the formula.
    """

    source: str
    ring: Steps
    summing: Steps | None = None
    has_trees: bool = False
    message: Steps | None = None
    measured: Annotated[tuple[MeasuredTime, ...], BeforeValidator(as_tuple)] = ()

    def __hash__(self) -> int:  # of every field it would take longer than what is cached by it
        return hash((self.ring, len(self.measured)))


class CardKind(Section):
    """A kind of network card (NIC), whatever its speed.

    Attributes:
        source: of the numbers.
        share: of its nominal speed that arrives.
        steps: see `Steps`.
        has_trees: see `Link`.
    """

    source: str
    share: Annotated[float, Field(gt=0, le=1)]
    steps: Latency
    has_trees: bool = False

    def link(self, gb_s: float) -> Link:
        """Return the link of a card, or of a part of one.

        Args:
            gb_s: its nominal speed in 10^9 bytes per second.
        """
        ring = Steps(**self.steps.model_dump(), gb_s=gb_s * self.share)
        return Link(source=self.source, ring=ring, has_trees=self.has_trees)
