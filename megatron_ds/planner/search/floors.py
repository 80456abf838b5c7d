"""Lower bounds of a layout's time and memory from a few traces, for thousands of candidates in a second.

One rank's share of the operations follows from traces on one rank and on the least number of ranks of each axis: passes
are divided, and what an axis exchanges keeps its size as a whole. They are timed in the largest micro-batch, where
products have the fewest partial tiles and messages the least latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from megatron_ds.config import ContextPlan, ParallelSection
from megatron_ds.parallel.grid import Layout
from megatron_ds.planner.held_parameters import hold_stage
from megatron_ds.planner.operations import Collective, LayerTrace
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.profiles import Device, Network
from megatron_ds.planner.search.branch_and_bound import Estimate
from megatron_ds.planner.search.model_traces import ModelTraces
from megatron_ds.planner.search.space import LARGEST_MICRO_BATCH, Candidate
from megatron_ds.planner.timing import links
from megatron_ds.planner.timing.pass_time import CONTENTION, Machine, pass_time
from megatron_ds.planner.timing.placement import Placement
from megatron_ds.planner.trace.setting import TraceSetting

CERTAIN_S, CERTAIN_BYTES = 0.97, 0.9
"""Shares of bounds of time and memory that are kept, for parts that an axis does not divide evenly."""


@dataclass(frozen=True)
class _Body:
    """A model with settings of activations: seconds of a row by part, and kept bytes of a block."""

    blocks_s: float
    others_s: float
    kept_bytes: float


@dataclass(frozen=True)
class _Sizes:
    """Elements of the model's trained parameters, those of experts apart, and the number of blocks."""

    dense: int
    experts: int
    num_blocks: int


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
        body, tensor = self._body(candidate, of_tensor=False), candidate.tensor
        alike = _Body(body.blocks_s / tensor, body.others_s / tensor, body.kept_bytes / tensor)
        return self._bound(candidate, alike, self._exchanged_s(candidate))

    def of_tensor(self, candidate: Candidate) -> Estimate:
        """Return the bound by the passes of one of the tensor ranks, divided by the context ranks."""
        exchanged_s = self._exchanged_s(candidate) - self._exchanged_s(replace(candidate, context=1, expert=None))
        return self._bound(candidate, self._body(candidate, of_tensor=True), max(0.0, exchanged_s))

    def _bound(self, candidate: Candidate, body: _Body, exchanged_s: float) -> Estimate:
        sizes, world = self._sizes, self._given.machines.world_size
        data = world // candidate.model_ranks
        count = self._given.config.global_batch_size // (data * candidate.micro_batch_size)
        rows = candidate.micro_batch_size
        block_s = rows * (body.blocks_s / sizes.num_blocks / candidate.context + exchanged_s)
        stage_s = ceil(sizes.num_blocks / candidate.pipeline) * block_s
        before = (sizes.num_blocks - 1) % candidate.pipeline  # stages before the last one that has so many blocks
        average_s = (block_s * sizes.num_blocks + body.others_s * rows / candidate.context) / candidate.pipeline
        passes_s = max((count + before) * stage_s, count * average_s)
        device, host = self._held(candidate)
        least = sizes.num_blocks // candidate.pipeline * min(candidate.pipeline, count)
        activations = CERTAIN_BYTES * body.kept_bytes * rows / candidate.context * least
        seconds = CERTAIN_S * (passes_s + self.gradients_s(candidate))
        return Estimate(seconds, int(device + activations), int(host))

    @cached_property
    def _alone(self) -> TraceSetting:
        """The setting of one rank and one row."""
        setting = replace(self._given.trace_setting(), tensor=1, sequence=False, context=ContextPlan(), expert=None)
        setting = replace(setting, micro_batch_size=1, zero_stage=1, recompute="none")
        return replace(setting, offload_activations=False, keep_attention=False)

    @cached_property
    def _sizes(self) -> _Sizes:
        shape = self._given.core.shape()
        stage = hold_stage(on_one_rank(self._given), 0)
        experts = sum(one.numel for one in stage.trained if one.spec.is_of_experts)
        dense = sum(one.numel for one in stage.trained) - experts
        return _Sizes(dense, experts, max(1, shape.num_layers))

    def _body(self, candidate: Candidate, *, of_tensor: bool) -> _Body:
        """Return the passes of one rank in the largest micro-batch, or of a tensor rank in one with as many tokens."""
        names = ("recompute", "keep_attention", "offload_activations")
        tensor, sequence = (candidate.tensor, candidate.sequence) if of_tensor else (1, False)
        rows = max(1, candidate.micro_batch_size // candidate.context) if of_tensor else LARGEST_MICRO_BATCH
        key = (tensor, sequence, rows, *(getattr(candidate, name) for name in names))
        if key not in self._bodies:
            kept = {name: getattr(candidate, name) for name in names}
            setting = replace(self._alone, tensor=tensor, sequence=sequence, micro_batch_size=rows, **kept)
            traces = self._traces.of(setting)
            machine = Machine(
                self._device, self._network, dict.fromkeys(("tensor", "neighbours"), self._placement(tensor, 1))
            )
            seconds = both_passes(traces, machine)
            blocks_s = sum(one for one, trace in zip(seconds, traces) if trace.is_block)
            least = min((one.kept_bytes - one.released_bytes for one in traces if one.is_block), default=0)
            of_row = (number / rows for number in (blocks_s, sum(seconds) - blocks_s, least))
            self._bodies[key] = _Body(*of_row)
        return self._bodies[key]

    def _exchanged_s(self, candidate: Candidate) -> float:
        """Return the seconds in which a block waits for tensor, context and expert ranks, for a row."""
        tensor, context, expert = candidate.tensor, candidate.context, candidate.expert or 1
        seconds = 0.0
        if tensor > 1:
            exchanged = self._exchanged("tensor", candidate.sequence)
            seconds += self._seconds(exchanged, tensor, self._placement(tensor, 1)) / context
        if context > 1 and self._heads // tensor % context == 0:
            exchanged = self._exchanged("context", sequence=False)
            fewer = self._axes["context"] / context / tensor
            seconds += self._seconds(exchanged, context, self._placement(context, tensor)) * fewer
        if expert not in (1, tensor):
            exchanged = self._exchanged("expert", sequence=False)
            placement = self._placement(expert, 1)
            seconds += self._seconds(exchanged, expert, placement) / (tensor * context)
        return seconds

    def _exchanged(self, axis: str, sequence: bool) -> tuple[Collective, ...]:
        """Return what a block exchanges on the least number of ranks of an axis, for a row; what hides is left out."""
        key = (axis, sequence)
        if key not in self._known_exchanges:
            ranks = self._axes[axis]
            settings: dict[str, dict[str, Any]] = {
                "tensor": {"tensor": ranks, "sequence": sequence},
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

    def _placement(self, ranks: int, stride: int) -> Placement:
        """Return the placement of ranks at a distance, at its best."""
        islands = ceil(ranks * stride / self._network.island)
        return Placement(ranks, islands, max(1, ranks // islands))

    def gradients_s(self, candidate: Candidate) -> float:
        """Return the seconds of gradients and weights between the ranks that hold the same part of the model."""
        data = self._given.machines.world_size // candidate.model_ranks
        count = self._given.config.global_batch_size // (data * candidate.micro_batch_size)
        ranks = data * candidate.context
        if ranks == 1:
            return 0.0
        element = self._given.dtype.itemsize
        size = int(self._sizes.dense / candidate.tensor / candidate.pipeline * element)
        placement = self._placement(ranks, candidate.tensor)
        reduced = links.seconds(Collective("reduce_scatter", "shard", size, ranks), placement, self._network)
        gathered = links.seconds(Collective("all_gather", "shard", size, ranks), placement, self._network)
        if candidate.zero_stage < 2:
            return reduced + gathered
        if candidate.zero_stage == 2:
            return CONTENTION * count * reduced + gathered
        return CONTENTION * count * (reduced + gathered)  # weights may stay gathered for both passes

    def held_bytes(self, candidate: Candidate) -> float:
        """Return the least bytes of weights, gradients and optimizer state on a device."""
        return self._held(candidate)[0]

    def _held(self, candidate: Candidate) -> tuple[float, float]:
        """Return the bytes of weights, gradients and optimizer state on a device and its host.

        Stage 1 keeps gradients whole, in fp32 for weights in bf16; stages 2 and 3 keep a part of them, in 2 bytes or
        more. The optimizer has at least 4 bytes of state, and fp32 weights unless the weights are.
        """
        sizes, element = self._sizes, self._given.dtype.itemsize
        tensor, expert = candidate.tensor, candidate.expert or candidate.tensor
        ranks = self._given.machines.world_size // candidate.tensor // candidate.pipeline
        gradients = 4 if self._given.engine.summary.precision == "bf16" else element
        state = self._state_bytes + (4 if element < 4 else 0)
        device = host = 0.0
        for number, shards in ((sizes.dense / tensor, ranks), (sizes.experts / expert, ranks * tensor / expert)):
            own = CERTAIN_BYTES * number / candidate.pipeline
            weights = element / shards if candidate.zero_stage == 3 else element
            held = gradients if candidate.zero_stage == 1 else element / max(1, shards)
            device += own * (0 if candidate.offload_param else weights)
            moved = own * state / max(1, shards)
            if candidate.offload_optimizer:
                host += moved
            else:
                device += own * held + moved
        return device, host

    @cached_property
    def _state_bytes(self) -> int:
        """Bytes of the optimizer's state of an element."""
        section = self._given.config.optimizer
        return 8 if section is not None and section.name == "adamw" else 0


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
