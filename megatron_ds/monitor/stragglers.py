"""Slow ranks: the seconds that each rank computes, communicates and waits for data, held against the median.

All ranks take as long for a step as the slowest, since they wait for it. So a rank is slow if it computes, or waits for
its data, longer than its peers do; the others then spend this time in communication.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("compute", "data")
"""The times by which a rank can be slow; their names are those of `RankTimes`, without the unit."""


MOST_NAMED = 8  # ranks in lines about one window


class RankTimes(NamedTuple):
    """Seconds of a rank, the mean of the measured steps of a window.

    Attributes:
        compute_s: all but the following: forward and backward pass, optimizer, callbacks, on rank 0 logging.
        communication_s: waiting for messages of other ranks.
        data_s: waiting for the next batch.
    """

    compute_s: float
    communication_s: float
    data_s: float


@dataclass(frozen=True)
class RankReport:
    """A rank in `stragglers.json`: the mean of its times over all windows.

    Attributes:
        rank, host: the rank and its machine.
        compute_s, communication_s, data_s: see `RankTimes`.
        slow_in: number of windows in which it was slow.
    """

    rank: int
    host: str
    compute_s: float
    communication_s: float
    data_s: float
    slow_in: int


@dataclass(frozen=True)
class StragglersReport:
    """The content of `stragglers.json`.

    Attributes:
        step: the last step of the last window.
        windows: number of windows.
        named_after: number of windows in a row after which a slow rank is named.
        ranks: of every rank.
    """

    step: int
    windows: int
    named_after: int
    ranks: list[RankReport]

    def describe(self) -> str:
        """Return such as `slow ranks: 3 (host gpu07, in 4 of 5 windows)`; empty if no rank was slow often enough."""
        slow = [one for one in self.ranks if one.slow_in >= self.named_after]
        if not slow:
            return ""
        more = f" and {len(slow) - MOST_NAMED} more" if len(slow) > MOST_NAMED else ""
        return (
            "slow ranks: "
            + ", ".join(
                f"{one.rank} (host {one.host}, in {one.slow_in} of {self.windows} windows)" for one in slow[:MOST_NAMED]
            )
            + more
        )


class Stragglers:
    """The windows of a run.

    Args:
        hosts: the machine of every rank.
        stages: the ranks of each pipeline stage, which compute the same and are compared with one another.
        threshold: a rank is slow if it takes longer than the median by this share of a step.
        windows: number of consecutive windows after which a slow rank is named.
    """

    def __init__(self, hosts: Sequence[str], stages: Sequence[Sequence[int]], threshold: float, windows: int) -> None:
        self._hosts, self._stages, self._threshold, self._windows = hosts, stages, threshold, windows
        self._sums = [[0.0, 0.0, 0.0] for _ in hosts]
        self._slow_in, self._count = [0] * len(hosts), 0
        self._in_a_row: dict[tuple[str, int], int] = {}
        self._named: set[tuple[str, int]] = set()

    def add(self, times: Sequence[RankTimes]) -> list[str]:
        """Add a window, and return a line for each rank that is named or no longer slow, of many for the first few."""
        self._count += 1
        for sums, own in zip(self._sums, times):
            sums[:] = (before + value for before, value in zip(sums, own))
        step_s = statistics.median(sum(own) for own in times)
        excess = {
            (kind, rank): (own, median)
            for kind in KINDS
            for rank, own, median in self._against_median(kind, times)
            if own - median > self._threshold * step_s
        }
        for rank in {rank for _, rank in excess}:
            self._slow_in[rank] += 1
        self._in_a_row = {key: self._in_a_row.get(key, 0) + 1 for key in excess}
        slow = {key for key, count in self._in_a_row.items() if count >= self._windows}
        slowed, recovered = sorted(slow - self._named), sorted(self._named - excess.keys())
        lines = [self._describe(key, *excess[key], step_s) for key in slowed[:MOST_NAMED]]
        lines += [
            f"rank {rank} (host {self._hosts[rank]}) is no longer slow ({kind})"
            for kind, rank in recovered[:MOST_NAMED]
        ]
        lines += [
            f"the same holds for {len(found) - MOST_NAMED} more ranks: {change}; see stragglers.json"
            for found, change in ((slowed, "they are slow"), (recovered, "they are no longer slow"))
            if len(found) > MOST_NAMED
        ]
        self._named = (self._named & excess.keys()) | slow
        return lines

    def numbers(self, times: Sequence[RankTimes]) -> dict[str, float]:
        """Return a window's numbers for `metrics.jsonl`: medians, the largest, the ranks that have them, slow ranks."""
        found: dict[str, float] = {}
        for index, field in enumerate(RankTimes._fields):
            values = [own[index] for own in times]
            largest = max(range(len(values)), key=values.__getitem__)
            found |= {f"{field}_median": statistics.median(values), f"{field}_max": values[largest]}
            found[f"{field.removesuffix('_s')}_max_rank"] = largest
        return {**found, "num_slow": len({rank for _, rank in self._named})}

    def report(self, step: int) -> StragglersReport:
        """Return the mean times of every rank after a step."""
        count = max(1, self._count)
        ranks = [
            RankReport(rank, host, sums[0] / count, sums[1] / count, sums[2] / count, slow_in)
            for rank, (host, sums, slow_in) in enumerate(zip(self._hosts, self._sums, self._slow_in))
        ]
        return StragglersReport(step, self._count, self._windows, ranks)

    def _against_median(self, kind: str, times: Sequence[RankTimes]) -> list[tuple[int, float, float]]:
        """Return (rank, its seconds, the median of its peers) of all ranks that have peers.

        Of two peers the faster one counts as the median.
        """
        groups = self._stages if kind == "compute" else [range(len(times))]
        found = []
        for ranks in groups:
            values = {rank: getattr(times[rank], f"{kind}_s") for rank in ranks}
            median = statistics.median_low(values.values())
            found += [(rank, own, median) for rank, own in values.items() if len(values) > 1]
        return found

    def _describe(self, key: tuple[str, int], own_s: float, median_s: float, step_s: float) -> str:
        kind, rank = key
        does = {"compute": "computes", "data": "waits for data"}[kind]
        return (
            f"rank {rank} (host {self._hosts[rank]}) is slow: it {does} for {own_s:.3f} s of a step, the median of its "
            f"peers is {median_s:.3f} s; all ranks wait for it, {(own_s - median_s) / step_s:.0%} of each step "
            f"({self._windows} windows in a row)"
        )
