"""Lower bounds of the time of gradients and weights between the ranks that hold the same part of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from megatron_ds.planner.operations import Collective, CollectiveKind
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.profiles import Network
from megatron_ds.planner.search.space import Candidate
from megatron_ds.planner.search.stage_shares import Kinds, StageShares
from megatron_ds.planner.timing import links
from megatron_ds.planner.timing.pass_time import CONTENTION
from megatron_ds.planner.timing.placement import Placement
from megatron_ds.planner.zero_settings import ZeroSettings, zero_settings


@dataclass(frozen=True)
class _Part:
    """Elements of a rank that the same ranks hold.

    Attributes:
        trained: elements that have gradients, on average over pipeline stages.
        ranks: that hold them; `placement` of these.
        kinds: that they are of.
    """

    trained: float
    ranks: int
    placement: Placement
    kinds: Kinds


class ShardFloors:
    """Lower bounds of candidates of a run.

    Args:
        given: the run, at any layout.
        shares: the stages of its model.
        network: links between the ranks.
    """

    def __init__(self, given: PlanInput, shares: StageShares, network: Network) -> None:
        self._given, self._shares, self._network = given, shares, network
        self._weights: dict[Kinds, tuple[Counter[float], float]] = {}

    def __call__(self, candidate: Candidate, passes_s: float) -> float:
        """Return the seconds of gradients and weights in a step.

        Stages 2 and 3 hide them behind the passes, which take at least `passes_s`: then each second of them costs
        `CONTENTION` of one, and what is longer than the passes costs all of it.
        """
        data = self._given.machines.world_size // candidate.model_ranks
        count = self._given.config.global_batch_size // (data * candidate.micro_batch_size)
        hidden_s, waited_s = 0.0, 0.0
        for part in self._parts(candidate):
            divided = candidate.zero_stage == 3
            reduced_s = self._seconds("reduce_scatter" if divided else "all_reduce", part.trained, part)
            if divided:
                hidden_s += count * self._gathers_s(part)
            elif candidate.zero_stage:
                waited_s += self._seconds("all_gather", part.trained, part)
            if candidate.zero_stage < 2:
                waited_s += reduced_s
            else:
                hidden_s += count * reduced_s
        return waited_s + hidden_s - (1 - CONTENTION) * min(hidden_s, passes_s)

    def _parts(self, candidate: Candidate) -> Iterator[_Part]:
        """Yield the elements of a rank: those of experts apart, if other ranks hold the same of them."""
        stages, expert = self._shares.of(candidate.pipeline), candidate.expert or candidate.tensor
        dense, experts = (
            sum(getattr(stage, kind) for stage in stages) / len(stages) for kind in ("trained_dense", "trained_experts")
        )
        kinds = [(False, dense / candidate.tensor, candidate.tensor), (True, experts / expert, expert)]
        ranks = self._given.machines.world_size // candidate.pipeline
        for divided in {candidate.tensor, expert}:
            own = [one for one in kinds if one[2] == divided]
            trained = sum(number for _, number, _ in own)
            if trained and ranks > divided:
                placement = nearest(self._network, ranks // divided, divided)
                yield _Part(trained, ranks // divided, placement, tuple((kind, by) for kind, _, by in own))

    def _seconds(self, kind: CollectiveKind, number: float, part: _Part) -> float:
        """Return the seconds of a collective of weights or gradients."""
        num_bytes = int(number * self._given.dtype.itemsize)
        return links.seconds(Collective(kind, "shard", num_bytes, part.ranks), part.placement, self._network)

    @cached_property
    def _zero(self) -> ZeroSettings:
        return zero_settings(self._given)

    def _gathers_s(self, part: _Part) -> float:
        """Return the seconds of the gathers of ZeRO-3 in a micro-batch.

        Weights stay from a forward to a backward pass, or the other way round, within the reuse distance. Of blocks, a
        gather has the weights of a module, or of those to come until they exceed the bucket. Other weights are few:
        they count as one gather.
        """
        if part.kinds not in self._weights:
            self._weights[part.kinds] = self._shares.block_sizes(part.kinds), self._shares.largest_module(part.kinds)
        sizes, largest_module = self._weights[part.kinds]
        weights = sum(count * size for size, count in sizes.items() if size > self._zero.param_persistence_threshold)
        gathered = self._with_repeated(weights)
        most = max(largest_module, self._zero.prefetch_bucket_size + max(sizes, default=0.0))
        gathers = max(1.0, gathered / most)
        others = max(0.0, part.trained - sum(count * size for size, count in sizes.items()))
        return gathers * self._seconds("all_gather", gathered / gathers, part) + self._seconds(
            "all_gather", others, part
        )

    def _with_repeated(self, weights: float) -> float:
        """Return the elements of weights that are gathered in both passes, each time that they are."""
        again = weights - 2 * self._zero.max_reuse_distance if self._zero.hpz == 1 else 0.0
        return weights + max(0.0, again)


def nearest(network: Network, ranks: int, stride: int) -> Placement:
    """Return the placement of ranks at a distance, at its best."""
    islands = ceil(ranks * stride / network.island)
    return Placement(ranks, islands, max(1, ranks // islands))
