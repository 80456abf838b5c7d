"""Layers and parameters of the stages of a pipeline, as far as lower bounds depend on them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from megatron_ds.engine.pipeline.partition import partition
from megatron_ds.models.context import BuildContext
from megatron_ds.planner.held_parameters import HeldParameter, HeldStage, hold_stage
from megatron_ds.planner.plan_input import PlanInput

Kinds = tuple[tuple[bool, int], ...]
"""Kinds of parameters: whether they are of experts, and the number of ranks that divide them."""


@dataclass(frozen=True)
class StageShare:
    """A pipeline stage of a model that no other axis divides.

    Attributes:
        first, end: index of its first layer, and of the first one behind it.
        num_blocks, blocks_before: blocks of it, and of the stages before.
        stages_left: stages from it to the last one.
        dense, experts: elements of its parameters.
        trained_dense, trained_experts: those of them that have gradients.
    """

    first: int
    end: int
    num_blocks: int
    blocks_before: int
    stages_left: int
    dense: int
    experts: int
    trained_dense: int
    trained_experts: int

    def in_flight(self, num_micro_batches: int) -> int:
        """Return the most micro-batches whose activations it holds at once."""
        return min(self.stages_left, num_micro_batches)


class StageShares:
    """The stages of a model by their number.

    Args:
        whole: a run on one rank.
    """

    def __init__(self, whole: PlanInput) -> None:
        self._whole = whole
        self._specs = whole.layers(BuildContext())
        self._known: dict[int, tuple[StageShare, ...]] = {}

    def of(self, pipeline: int) -> tuple[StageShare, ...]:
        """Return the stages of a pipeline of so many ranks."""
        if pipeline not in self._known:
            bounds = partition(self._specs, pipeline)
            found: list[StageShare] = []
            for number, (first, end) in enumerate(pairwise(bounds)):
                before = found[-1].blocks_before + found[-1].num_blocks if found else 0
                blocks = sum(spec.is_block for spec in self._specs[first:end])
                found.append(StageShare(first, end, blocks, before, pipeline - number, *self._elements(first, end)))
            self._known[pipeline] = tuple(found)
        return self._known[pipeline]

    def _elements(self, first: int, end: int) -> tuple[int, int, int, int]:
        own = [one for layer in range(first, end) for one in self._parameters.get(layer, ())]
        trained = [one for one in own if one.trains]
        return *_by_kind(own), *_by_kind(trained)

    def block_sizes(self, kinds: Kinds) -> Counter[float]:
        """Return the elements of a rank's parameters of blocks -> number of such parameters.

        Args:
            kinds: of the parameters: whether they are of experts, and the ranks that divide them.
        """
        divided = dict(kinds)
        found: Counter[float] = Counter()
        for (of_experts, numel), count in self._block_parameters.items():
            if of_experts in divided:
                found[numel / divided[of_experts]] += count
        return found

    def largest_module(self, kinds: Kinds) -> float:
        """Return the elements of the parameters of such kinds that one module of a block reads itself, at most."""
        divided = dict(kinds)
        found = (
            sum(one.numel / divided[one.spec.is_of_experts] for one in used if one.spec.is_of_experts in divided)
            for used in self._stage.used.values()
            if all(self._specs[one.layer].is_block for one in used)
        )
        return max(found, default=0.0)

    @cached_property
    def _block_parameters(self) -> Counter[tuple[bool, int]]:
        blocks = (one for one in self._stage.parameters if self._specs[one.layer].is_block)
        return Counter((one.spec.is_of_experts, one.numel) for one in blocks)

    @cached_property
    def _stage(self) -> HeldStage:
        return hold_stage(self._whole, 0)

    @cached_property
    def _parameters(self) -> dict[int, list[HeldParameter]]:
        found: dict[int, list[HeldParameter]] = {}
        for one in self._stage.parameters:
            found.setdefault(one.layer, []).append(one)
        return found


def _by_kind(parameters: list[HeldParameter]) -> tuple[int, int]:
    """Return the elements of parameters that are not of experts, and of those that are."""
    experts = sum(one.numel for one in parameters if one.spec.is_of_experts)
    return sum(one.numel for one in parameters) - experts, experts
