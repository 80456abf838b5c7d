"""Lower bounds of a layout's time and memory from a few traces, for thousands of candidates in a second.

One rank's share of the operations follows from traces on one rank and on the least number of ranks of each axis: passes
are divided, and what an axis exchanges keeps its size as a whole. They are timed in the largest micro-batch, where
products have the fewest partial tiles and messages the least latency. Layers, parameters and micro-batches in flight
are those of the pipeline's real stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from megatron_ds.config import ContextPlan, ParallelSection
from megatron_ds.parallel.grid import Layout
from megatron_ds.planner.operations import Collective, LayerTrace
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.profiles import Device, Network
from megatron_ds.planner.profiles.link import US
from megatron_ds.planner.search.branch_and_bound import Estimate
from megatron_ds.planner.search.memory_floors import MemoryFloors
from megatron_ds.planner.search.model_traces import ModelTraces
from megatron_ds.planner.search.shard_floors import ShardFloors, nearest
from megatron_ds.planner.search.space import LARGEST_MICRO_BATCH, Candidate
from megatron_ds.planner.search.stage_shares import StageShare, StageShares
from megatron_ds.planner.timing import links
from megatron_ds.planner.timing.pass_time import CONTENTION, HOST_COPIES, Machine, num_launches, pass_time
from megatron_ds.planner.timing.placement import Placement
from megatron_ds.planner.trace.setting import TraceSetting

CERTAIN_S = 0.97
"""Share of bounds of time that is kept: measured times of a calibration need not grow with sizes as formulas do."""
ENOUGH_ROWS = 256
"""Rows whose tokens fill the tiles of every expert's products, so that more rows are no faster, within a percent."""


@dataclass(frozen=True)
class _Body:
    """Layers with settings of activations, and the seconds that they compute for a row, or copy to the host.

    Attributes:
        passes_s: of the forward and the backward pass of the fastest block.
        blocks_s: of all blocks.
        others_s: of all other layers, with what they wait for.
        tail_s: of those behind the last block.
        kept_bytes: of the block that keeps least.
        launches_s: in which the host starts the kernels of both passes of a block, for any number of rows.
    """

    passes_s: tuple[float, float]
    blocks_s: float
    others_s: float
    tail_s: float
    kept_bytes: float
    launches_s: tuple[float, float]

    def block_s(self, ranks: int, rows: int) -> float:
        """Return the seconds of both passes of a block for one row of several, divided over ranks."""
        return sum(max(one / ranks, started / rows) for one, started in zip(self.passes_s, self.launches_s))


class _Exchange(NamedTuple):
    """A collective of a block.

    Attributes:
        collective: for one row; `calls` of them.
        fixed_bytes, row_bytes: its size, in all and for each row.
    """

    collective: Collective
    calls: int
    fixed_bytes: int
    row_bytes: int


class LayoutFloors:
    """Lower bounds of candidates of a run.

    Args:
        given: the run, at any layout.
        traces: of its model.
        device, network: profiles.
        axes: axis ("tensor", "context", "expert") -> the least number of its ranks above 1 that is considered.
    """

    def __init__(
        self, given: PlanInput, traces: ModelTraces, device: Device, network: Network, axes: dict[str, int]
    ) -> None:
        self._given, self._traces, self._device, self._network, self._axes = given, traces, device, network, axes
        self._bodies: dict[tuple[object, ...], _Body] = {}
        self._heads = given.core.shape().num_attention_heads

    def __call__(self, candidate: Candidate) -> Estimate:
        """Return the bound by the passes of one rank, divided by the ranks."""
        return self._bound(candidate, self._body(candidate, of_tensor=False), candidate.tensor * candidate.context)

    def of_tensor(self, candidate: Candidate) -> Estimate:
        """Return the bound by the passes of one of the tensor ranks, divided by the context ranks."""
        return self._bound(candidate, self._body(candidate, of_tensor=True), candidate.context)

    def _bound(self, candidate: Candidate, body: _Body, ranks: int) -> Estimate:
        """Return the bound by passes that are divided over some ranks."""
        rows, exchanged_s = candidate.micro_batch_size, self._exchanged_s(candidate)
        stages, count = self.stages(candidate.pipeline), self._num_micro_batches(candidate)
        num_blocks = sum(stage.num_blocks for stage in stages)
        block_s = body.block_s(ranks, rows) + exchanged_s
        blocks_s = max(body.blocks_s / ranks + num_blocks * exchanged_s, num_blocks * block_s)
        average_s = count * (blocks_s + body.others_s / ranks) / len(stages)
        ends_s = (count * stage.num_blocks + stage.blocks_before for stage in stages)
        last = stages[-1]
        last_s = (count * last.num_blocks + last.blocks_before) * block_s + count * body.tail_s / ranks
        passes_s = rows * max(block_s * max(ends_s), last_s, average_s)
        activations = [rows * body.kept_bytes / ranks * stage.num_blocks * stage.in_flight(count) for stage in stages]
        device, host = self.memory(candidate, activations, count)
        return Estimate(CERTAIN_S * (passes_s + self.shards(candidate, passes_s)), device, host)

    def _num_micro_batches(self, candidate: Candidate) -> int:
        data = self._given.machines.world_size // candidate.model_ranks
        return self._given.config.global_batch_size // (data * candidate.micro_batch_size)

    def stages(self, pipeline: int) -> tuple[StageShare, ...]:
        """Return the stages of a pipeline of so many ranks."""
        return self._shares.of(pipeline)

    @cached_property
    def _alone(self) -> TraceSetting:
        """The setting of one rank and one row."""
        setting = replace(self._given.trace_setting(), tensor=1, sequence=False, context=ContextPlan(), expert=None)
        setting = replace(setting, micro_batch_size=1, zero_stage=1, recompute="none")
        return replace(setting, offload_activations=False, keep_attention=False)

    @cached_property
    def memory(self) -> MemoryFloors:
        """The bounds of memory."""
        return MemoryFloors(self._given, self._shares)

    @cached_property
    def shards(self) -> ShardFloors:
        """The bounds of the time of gradients and weights between data ranks."""
        return ShardFloors(self._given, self._shares, self._network)

    @cached_property
    def _shares(self) -> StageShares:
        return StageShares(on_one_rank(self._given))

    @property
    def _largest_rows(self) -> int:
        """Rows of which the experts of a rank get tokens, at most, or so many that more would change nothing."""
        return min(ENOUGH_ROWS, LARGEST_MICRO_BATCH * max(1, self._num_experts))

    @cached_property
    def _num_experts(self) -> int:
        return self._given.core.shape().num_experts

    def _body(self, candidate: Candidate, *, of_tensor: bool) -> _Body:
        """Return the passes of one rank in the largest micro-batch, or of a tensor rank in one with as many tokens."""
        names = ("recompute", "keep_attention", "offload_activations")
        tensor, sequence = (candidate.tensor, candidate.sequence) if of_tensor else (1, False)
        rows, expert = self._largest_rows, None
        if of_tensor:
            folded = candidate.expert not in (None, tensor)
            expert = 1 if folded else None  # all experts, which get the tokens of all ranks that divide them
            gathered = candidate.micro_batch_size * (candidate.expert or 1 if folded else 1)
            rows = min(self._largest_rows, max(1, gathered // candidate.context))
        key = (tensor, sequence, expert, rows, *(getattr(candidate, name) for name in names))
        if key not in self._bodies:
            kept = {name: getattr(candidate, name) for name in names}
            setting = replace(
                self._alone, tensor=tensor, sequence=sequence, expert=expert, micro_batch_size=rows, **kept
            )
            self._bodies[key] = self._body_of(self._traces.of(setting), tensor, rows)
        return self._bodies[key]

    def _body_of(self, traces: Sequence[LayerTrace], tensor: int, rows: int) -> _Body:
        placed = dict.fromkeys(("tensor", "neighbours"), nearest(self._network, tensor, 1))
        machine = Machine(self._device, self._network, placed)
        blocks = [number for number, trace in enumerate(traces) if trace.is_block]
        behind = blocks[-1] + 1 if blocks else len(traces)
        others = [number for number, trace in enumerate(traces) if not trace.is_block]
        seconds = dict(zip(others, both_passes([traces[number] for number in others], machine)))
        known = {traces[number].like: traces[number] for number in blocks}
        busy_s = {like: self._busy_s(one, machine) for like, one in known.items()}
        return _Body(
            passes_s=_least(busy_s.values(), 1 / rows),
            blocks_s=sum(sum(busy_s[traces[number].like]) for number in blocks) / rows,
            others_s=sum(seconds.values()) / rows,
            tail_s=sum(one for number, one in seconds.items() if number >= behind) / rows,
            kept_bytes=min((one.kept_bytes - one.released_bytes for one in known.values()), default=0) / rows,
            launches_s=self._launches_s(known.values()),
        )

    def _busy_s(self, block: LayerTrace, machine: Machine) -> tuple[float, float]:
        """Return the seconds in which each pass computes, or copies to the host."""
        forward, backward = (pass_time(work, machine) for work in (block.forward, block.backward))
        forward_s, backward_s = (one.compute_s + one.exposed_s.get(HOST_COPIES, 0.0) for one in (forward, backward))
        return forward_s, backward_s

    def _launches_s(self, blocks: Iterable[LayerTrace]) -> tuple[float, float]:
        """Return the seconds in which the host starts the kernels of each pass of the block that has fewest."""
        if self._given.config.mlp_tile_tokens is not None:  # fewer rows have fewer tiles
            return 0.0, 0.0
        counts = ((num_launches(one.forward), num_launches(one.backward)) for one in blocks)
        return _least(counts, self._device.host_us * US)

    def _exchanged_s(self, candidate: Candidate) -> float:
        """Return the seconds in which a block waits for tensor, context and expert ranks, for a row."""
        tensor, context, expert = candidate.tensor, candidate.context, candidate.expert or 1
        rows, seconds = candidate.micro_batch_size, 0.0
        if tensor > 1:
            divides_experts = self._num_experts > 0 and candidate.expert in (None, tensor)
            exchanged = self._exchanged("experts over tensor" if divides_experts else "tensor", candidate.sequence)
            seconds += self._seconds(exchanged, tensor, 1, rows / context)
        if context > 1 and self._heads // tensor % context == 0:
            exchanged = self._exchanged("context", sequence=False)
            seconds += self._seconds(exchanged, context, tensor, rows / tensor)
        if expert not in (1, tensor):
            exchanged = self._exchanged("expert", sequence=False)
            seconds += self._seconds(exchanged, expert, 1, rows / (tensor * context))
        return seconds / rows

    def _exchanged(self, axis: str, sequence: bool) -> tuple[tuple[_Exchange, ...], ...]:
        """Return what each block exchanges on the least number of ranks of an axis."""
        key = (axis, sequence)
        if key not in self._known_exchanges:
            ranks = self._axes[axis.split()[-1]]
            settings: dict[str, dict[str, Any]] = {
                "tensor": {"tensor": ranks, "sequence": sequence, "expert": 1 if self._num_experts else None},
                "experts over tensor": {"tensor": ranks, "sequence": sequence},
                "expert": {"expert": ranks},
                "context": {"context": ContextPlan(ulysses=ranks)},
            }
            setting = replace(self._alone, **settings[axis])
            by_rows = (self._collectives(replace(setting, micro_batch_size=rows)) for rows in (1, 2))
            self._known_exchanges[key] = tuple(_growing(one, two) for one, two in zip(*by_rows))
        return self._known_exchanges[key]

    def _collectives(self, setting: TraceSetting) -> list[list[tuple[Collective, int]]]:
        """Return the collectives of each block that differs from the others, and how many there are of each."""
        blocks = {trace.like: trace for trace in self._traces.of(setting) if trace.is_block}
        works = [block.forward + block.backward for block in blocks.values()]
        return [[(one, count) for one, count in work.items() if isinstance(one, Collective)] for work in works]

    @cached_property
    def _known_exchanges(self) -> dict[tuple[str, bool], tuple[tuple[_Exchange, ...], ...]]:
        return {}

    def _seconds(self, exchanged: Sequence[Sequence[_Exchange]], ranks: int, stride: int, rows: float) -> float:
        """Return the seconds of the collectives of the block that needs least, among other ranks.

        Args:
            exchanged: by the least number of ranks.
            ranks, stride: number and distance of the ranks.
            rows: that are exchanged, or a part of one.
        """
        key = (exchanged, ranks, stride, rows)
        if key not in self._known_seconds:
            placement = nearest(self._network, ranks, stride)
            each = (sum(self._of_exchange(one, ranks, placement, rows) for one in block) for block in exchanged)
            self._known_seconds[key] = min(each, default=0.0)
        return self._known_seconds[key]

    def _of_exchange(self, one: _Exchange, ranks: int, placement: Placement, rows: float) -> float:
        """Return the seconds of collectives; of hidden ones those by which they slow the passes."""
        given = one.collective
        divided = ranks / given.ranks if given.kind == "all_to_all" and given.axis != "expert" else 1
        scaled = replace(given, ranks=ranks, num_bytes=int(one.fixed_bytes + one.row_bytes * rows / divided))
        share = CONTENTION if given.hidden else 1.0
        return share * one.calls * links.seconds(scaled, placement, self._network)

    @cached_property
    def _known_seconds(self) -> dict[tuple[object, ...], float]:
        return {}


def _growing(one: Sequence[tuple[Collective, int]], two: Sequence[tuple[Collective, int]]) -> tuple[_Exchange, ...]:
    """Return collectives by those of one row and of two; they grow with rows where both have the same ones."""
    alike = [(first.kind, count) for first, count in one] == [(first.kind, count) for first, count in two]
    grows = [second.num_bytes - first.num_bytes if alike else 0 for (first, _), (second, _) in zip(one, two)]
    return tuple(
        _Exchange(first, count, first.num_bytes - more, more) for (first, count), more in zip(one, grows, strict=alike)
    )


def _least(passes: Iterable[tuple[float, float]], factor: float) -> tuple[float, float]:
    """Return the least of all forward and of all backward passes, times a factor; 0 of none."""
    each = list(passes)
    return (
        factor * min((forward for forward, _ in each), default=0.0),
        factor * min((backward for _, backward in each), default=0.0),
    )


def both_passes(traces: Sequence[LayerTrace], machine: Machine) -> list[float]:
    """Return the seconds of the forward and the backward pass of each layer."""
    found: dict[str, float] = {}
    for trace in traces:
        if trace.like not in found:
            works = (trace.forward, trace.backward)
            found[trace.like] = sum(pass_time(work, machine).total_s for work in works)
    return [found[trace.like] for trace in traces]


def on_one_rank(given: PlanInput) -> PlanInput:
    """Return a run on one rank that holds the whole model; its batches need not be possible there."""
    config = given.config.model_copy(update={"parallel": ParallelSection()})
    engine = replace(given.engine, config=config, layout=Layout(), context=ContextPlan())
    return given.with_engine(engine)
