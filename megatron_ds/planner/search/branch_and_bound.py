"""Search for the fastest layouts of a run under a memory limit, by best-first branch and bound.

Estimators of a candidate are ordered from the cheapest to the exact one, and none says more time or memory than the
next. The candidate with the least time known so far is always estimated better, so that candidates leave the queue in
the order of their exact time, and the exact estimator sees only those that the cheaper ones could not rule out (A* with
lazy evaluation; Hart et al. 1968). Candidates that differ in settings of activations alone are a chain, of which the
next one is considered when the one before does not fit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from megatron_ds.config import RunConfig, check_ramped_lengths
from megatron_ds.errors import ConfigError, MegatronDSError, TopologyError
from megatron_ds.hf.config import HFModel
from megatron_ds.planner.search.space import Candidate, Space, with_candidate
from megatron_ds.runtime.setup import plan_run

GB = 10**9
_NUM_SMALLEST = 8  # candidates of which the smallest one is named when none fits


@dataclass(frozen=True)
class Estimate:
    """Time and memory of a candidate, or lower bounds of them.

    Attributes:
        step_s: of an optimizer step.
        device_bytes: peak of the rank that needs the most.
        host_bytes: of a rank, in host memory.
    """

    step_s: float
    device_bytes: int = 0
    host_bytes: int = 0


Estimator = Callable[[Candidate], Estimate]


@dataclass(frozen=True)
class Limits:
    """Memory of a rank, on its device and of its host."""

    device_bytes: float = math.inf
    host_bytes: float = math.inf

    def hold(self, estimate: Estimate) -> bool:
        """Return whether an estimate is within the limits."""
        return estimate.device_bytes <= self.device_bytes and estimate.host_bytes <= self.host_bytes


@dataclass(frozen=True)
class FoundLayout:
    """A layout that fits.

    Attributes:
        candidate: the layout and settings.
        estimate: exact, by the model.
        run: the run with them.
    """

    candidate: Candidate
    estimate: Estimate
    run: RunConfig


@dataclass
class SearchCounts:
    """Statistics of a search.

    Attributes:
        candidates: that the space has.
        illegal: that the run's checks refused.
        too_large: that did not fit, by any estimator.
        estimated: calls of each estimator.
    """

    candidates: int = 0
    illegal: int = 0
    too_large: int = 0
    estimated: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class SearchResult:
    """The layouts that a search found, the fastest first, and what it did."""

    found: tuple[FoundLayout, ...]
    counts: SearchCounts


def best_first(
    chains: Iterable[Sequence[Candidate]],
    estimators: Sequence[Estimator],
    limits: Limits,
    is_legal: Callable[[Candidate], bool],
    counts: SearchCounts,
) -> Iterator[tuple[Candidate, Estimate]]:
    """Yield the fastest candidate that fits of each layout, in the order of their time; equal ones in their own order.

    Args:
        chains: candidates of one layout; none of a chain is slower than the next.
        estimators: from the cheapest to the exact one; none says more than the next.
        limits: of memory.
        is_legal: asked once, after the cheapest estimator.
        counts: what is counted.
    """
    counts.estimated = [0] * len(estimators)
    queue: list[tuple[float, int, int, Sequence[Candidate], Estimate]] = []

    def push(least_s: float, number: int, chain: Sequence[Candidate], known: int) -> None:
        """Estimate the first of a chain that fits, of which `least_s` is known, by the estimator `known`."""
        while chain:
            counts.estimated[known] += 1
            found = estimators[known](chain[0])
            if limits.hold(found):
                heapq.heappush(queue, (max(least_s, found.step_s), number, known + 1, chain, found))
                return
            counts.too_large += 1
            chain, known = chain[1:], 0

    for number, chain in enumerate(chains):
        counts.candidates += len(chain)
        push(0.0, number, chain, 0)
    found_layouts = set()
    while queue:
        least_s, number, known, chain, found = heapq.heappop(queue)
        if chain[0].layout in found_layouts:
            continue
        if known == 1 and not is_legal(chain[0]):
            counts.illegal += 1
            push(least_s, number, chain[1:], 0)
        elif known == len(estimators):
            found_layouts.add(chain[0].layout)
            yield chain[0], found
        else:
            push(least_s, number, chain, known)


def search_layouts(
    space: Space, hf: HFModel, device_type: str, estimators: Sequence[Estimator], limits: Limits, num_found: int = 5
) -> SearchResult:
    """Return the fastest layouts that fit, each with its best settings.

    Args:
        space: what is considered.
        hf: the run's model.
        device_type: torch's name, such as `cpu` or `cuda`.
        estimators: see `best_first`.
        limits: of memory.
        num_found: number of layouts; those that differ in settings alone count once.

    Raises:
        ConfigError: no layout fits.
        TopologyError: no layout is legal; with the reason for the simplest one.
    """
    is_legal = _Legality(space, hf, device_type)
    for offload in (False, True) if space.offload else (False,):
        result = _search(replace(space, offload=offload), estimators, limits, is_legal, num_found)
        if result.found:
            return result
    raise _refusal(space, estimators, limits, is_legal)


def _search(
    space: Space, estimators: Sequence[Estimator], limits: Limits, is_legal: Callable[[Candidate], bool], num_found: int
) -> SearchResult:
    counts = SearchCounts()
    ordered = islice(best_first(space.chains(), estimators, limits, is_legal, counts), num_found)
    found = [FoundLayout(one, estimate, with_candidate(space.run, one)) for one, estimate in ordered]
    found.sort(key=lambda one: one.estimate.step_s)  # by measured times a bound may be slightly too high
    return SearchResult(tuple(found), counts)


def first_legal(space: Space, hf: HFModel, device_type: str) -> RunConfig:
    """Return the run with a layout that is legal on the machines, its own if that is.

    Raises:
        ConfigError, TopologyError: no layout is legal.
    """
    is_legal = _Legality(space, hf, device_type)
    if is_legal(space.own):
        return space.run
    found = next(filter(is_legal, space), None)
    if found is None:
        raise _refused_batch(space) if is_legal.reason is None else is_legal.reason
    return with_candidate(space.run, found)


class _Legality:
    """The checks by which `train` refuses a run.

    Attributes:
        reason: the last refusal.
    """

    def __init__(self, space: Space, hf: HFModel, device_type: str) -> None:
        self._space, self._hf, self._device_type = space, hf, device_type
        self.reason: MegatronDSError | None = None

    def __call__(self, candidate: Candidate) -> bool:
        run = with_candidate(self._space.run, candidate)
        try:
            plan = plan_run(run, self._hf, self._space.world_size, self._device_type)
            check_ramped_lengths(run, plan.context, is_causal=True)  # what is not causal is refused at every layout
        except (ConfigError, TopologyError) as problem:
            self.reason = problem
            return False
        return True


def _refusal(space: Space, estimators: Sequence[Estimator], limits: Limits, is_legal: _Legality) -> MegatronDSError:
    """Return the error that says what is missing: a batch that can be divided, a legal layout, or memory."""
    smallest = sorted(space, key=lambda one: estimators[0](one).device_bytes)
    if not smallest:
        return _refused_batch(space)
    legal = list(islice(filter(is_legal, smallest), _NUM_SMALLEST))
    if not legal:
        assert is_legal.reason is not None
        return is_legal.reason
    estimates = {candidate: estimators[-1](candidate) for candidate in legal}
    best = min(legal, key=lambda one: estimates[one].device_bytes)
    needed, device = estimates[best], limits.device_bytes
    if needed.device_bytes > device:
        what = f"{needed.device_bytes / GB:.1f} GB on each device, which has {device / GB:.1f} GB"
    else:
        what = f"{needed.host_bytes / GB:.1f} GB of host memory a rank, which has {limits.host_bytes / GB:.1f} GB"
    return ConfigError(
        f"no layout of {space.world_size} ranks fits: the smallest found ({best.describe()}) needs {what}; try more "
        "nodes, devices with more memory, or a smaller data.seq_length"
    )


def _refused_batch(space: Space) -> TopologyError:
    batch, world = space.run.train.global_batch_size, space.world_size
    sizes = {world // layout.model_ranks for layout in space.layouts()}
    least = min(sizes)
    below = batch // least * least
    near = " or ".join(str(one) for one in (below, below + least) if one)
    return TopologyError(
        f"train.global_batch_size={batch} cannot be divided over {world} ranks: of the model's layouts that with the "
        f"fewest data ranks has {least}; nearest: {near}"
    )
