"""Lower bounds of a layout's time and memory from a few traces, for thousands of candidates in a second.

One rank's share of the operations follows from traces on one rank and on the least number of ranks of each axis: passes
are divided, and what an axis exchanges keeps its size as a whole. They are timed in the largest micro-batch, where
products have the fewest partial tiles and messages the least latency. Layers, parameters and micro-batches in flight
are those of the pipeline's real stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

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
from megatron_ds.planner.timing.pass_time import Machine, num_launches, pass_time
from megatron_ds.planner.timing.placement import Placement
from megatron_ds.planner.trace.setting import TraceSetting

CERTAIN_S = 0.97
"""Share of bounds of time that is kept: measured times of a calibration need not grow with sizes as formulas do."""
ENOUGH_ROWS = 256
"""Rows whose tokens fill the tiles of every expert's products, so that more rows are no faster, within a percent."""


@dataclass(frozen=True)
class _Body:
    """A model with settings of activations, for a row: seconds of both passes, of a block and behind the blocks too.

    Attributes:
        model_s: of all layers.
        block_s: of the fastest block.
        tail_s: of the layers behind the last block.
        kept_bytes: of the block that keeps least.
        launches_s: in which the host starts the kernels of the block that has fewest, for any number of rows.
    """

    model_s: float
    block_s: float
    tail_s: float
    kept_bytes: float
    launches_s: float

    def divided(self, ranks: int) -> _Body:
        """Return the share of one of several ranks, each of which starts all kernels."""
        parts = (getattr(self, one.name) / ranks for one in fields(self))
        return replace(_Body(*parts), launches_s=self.launches_s)


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
        body = self._body(candidate, of_tensor=False).divided(candidate.tensor)
        return self._bound(candidate, body, self._exchanged_s(candidate))

    def of_tensor(self, candidate: Candidate) -> Estimate:
        """Return the bound by the passes of one of the tensor ranks, divided by the context ranks."""
        exchanged_s = self._exchanged_s(candidate) - self._exchanged_s(replace(candidate, context=1, expert=None))
        return self._bound(candidate, self._body(candidate, of_tensor=True), max(0.0, exchanged_s))

    def _bound(self, candidate: Candidate, body: _Body, exchanged_s: float) -> Estimate:
        rows, share = candidate.micro_batch_size, body.divided(candidate.context)
        stages, count = self.stages(candidate.pipeline), self._num_micro_batches(candidate)
        num_blocks = sum(stage.num_blocks for stage in stages)
        block_s = max(share.block_s, share.launches_s / rows) + exchanged_s
        model_s = max(share.model_s + num_blocks * exchanged_s, num_blocks * block_s)
        average_s = count * model_s / len(stages)
        ends_s = (count * stage.num_blocks + stage.blocks_before for stage in stages)
        last = stages[-1]
        last_s = (count * last.num_blocks + last.blocks_before) * block_s + count * share.tail_s
        passes_s = rows * max(block_s * max(ends_s), last_s, average_s)
        activations = [rows * share.kept_bytes * stage.num_blocks * stage.in_flight(count) for stage in stages]
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

    @property
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
            traces = self._traces.of(setting)
            machine = Machine(
                self._device, self._network, dict.fromkeys(("tensor", "neighbours"), nearest(self._network, tensor, 1))
            )
            seconds = both_passes(traces, machine)
            blocks = [number for number, trace in enumerate(traces) if trace.is_block]
            least_s = min((seconds[number] for number in blocks), default=0.0)
            kept_bytes = min(
                (traces[number].kept_bytes - traces[number].released_bytes for number in blocks), default=0
            )
            tail_s = sum(seconds[blocks[-1] + 1 :]) if blocks else 0.0
            launches_s = self._launches_s([traces[number] for number in blocks])
            each = (one / rows for one in (sum(seconds), least_s, tail_s, kept_bytes))
            self._bodies[key] = _Body(*each, launches_s)
        return self._bodies[key]

    def _launches_s(self, blocks: Sequence[LayerTrace]) -> float:
        """Return the seconds in which the host starts the kernels of both passes of the block that has fewest."""
        if self._given.config.mlp_tile_tokens is not None:  # fewer rows have fewer tiles
            return 0.0
        fewest = min((num_launches(one.forward) + num_launches(one.backward) for one in blocks), default=0)
        return fewest * self._device.host_us * US

    def _exchanged_s(self, candidate: Candidate) -> float:
        """Return the seconds in which a block waits for tensor, context and expert ranks, for a row."""
        tensor, context, expert = candidate.tensor, candidate.context, candidate.expert or 1
        seconds = 0.0
        if tensor > 1:
            exchanged = self._exchanged("tensor", candidate.sequence)
            seconds += self._seconds(exchanged, tensor, nearest(self._network, tensor, 1)) / context
        if context > 1 and self._heads // tensor % context == 0:
            exchanged = self._exchanged("context", sequence=False)
            fewer = self._axes["context"] / context / tensor
            seconds += self._seconds(exchanged, context, nearest(self._network, context, tensor)) * fewer
        if expert not in (1, tensor):
            exchanged = self._exchanged("expert", sequence=False)
            placement = nearest(self._network, expert, 1)
            seconds += self._seconds(exchanged, expert, placement) / (tensor * context)
        return seconds

    def _exchanged(self, axis: str, sequence: bool) -> tuple[Collective, ...]:
        """Return what a block exchanges on the least number of ranks of an axis, for a row; what hides is left out."""
        key = (axis, sequence)
        if key not in self._known_exchanges:
            ranks = self._axes[axis]
            settings: dict[str, dict[str, Any]] = {
                "tensor": {"tensor": ranks, "sequence": sequence, "expert": 1 if self._num_experts else None},
                "expert": {"expert": ranks},
                "context": {"context": ContextPlan(ulysses=ranks)},
            }
            traces = self._traces.of(replace(self._alone, **settings[axis]))
            blocks = [trace for trace in traces if trace.is_block]
            least = min(blocks, key=lambda trace: sum(trace.forward.sent_bytes.values()))
            self._known_exchanges[key] = tuple(
                one
                for work in (least.forward, least.backward)
                for one in work.elements()
                if isinstance(one, Collective) and not one.hidden
            )
        return self._known_exchanges[key]

    @cached_property
    def _known_exchanges(self) -> dict[tuple[str, bool], tuple[Collective, ...]]:
        return {}

    def _seconds(self, exchanged: Sequence[Collective], ranks: int, placement: Placement) -> float:
        """Return the seconds of collectives of one row among other ranks, as parts of those of the largest batch."""
        key = (exchanged, ranks, placement)
        if key not in self._known_seconds:
            rows = LARGEST_MICRO_BATCH
            many = (replace(one, ranks=ranks, num_bytes=one.num_bytes * rows) for one in exchanged)
            self._known_seconds[key] = sum(links.seconds(one, placement, self._network) for one in many) / rows
        return self._known_seconds[key]

    @cached_property
    def _known_seconds(self) -> dict[tuple[object, ...], float]:
        return {}


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
