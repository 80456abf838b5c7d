"""Placement of the ranks of an axis on islands of fast links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ds.parallel.grid import ROLES, Layout


@dataclass(frozen=True)
class Placement:
    """The spread of a group's ranks over islands.

    Attributes:
        ranks: of the group.
        islands: number of islands that hold some of them.
        per_island: number of them on the island that holds the fewest: so many shares of its NICs serve one group.
    """

    ranks: int
    islands: int = 1
    per_island: int = 1

    @classmethod
    def of(cls, ranks: Sequence[int], island: int) -> Placement:
        """Return the placement of global ranks on islands of `island` consecutive ones."""
        held = Counter(rank // island for rank in ranks)
        return cls(len(ranks), len(held), min(held.values()))


def place(layout: Layout, island: int, expert: int | None = None, ulysses: int | None = None) -> dict[str, Placement]:
    """Return the placement of every axis and role of a layout; see `parallel.grid`.

    Where groups of an axis lie differently, because islands are no multiple of it, the result is the worst of the two
    groups at the ends of the first island.

    Args:
        layout: sizes of the axes.
        island: number of consecutive ranks that fast links join.
        expert: number of ranks that divide the experts of a layer; None = the tensor ranks do.
        ulysses: number of context ranks that exchange heads; None = all of them.
    """
    ends = (0, min(island, layout.world_size) - 1)
    groups = [_groups_of(rank, layout, expert or layout["tensor"], ulysses or layout["context"]) for rank in ends]
    placed = [{name: Placement.of(ranks, island) for name, ranks in one.items()} for one in groups]
    return {name: max((one[name] for one in placed), key=_badness) for name in placed[0]}


def _badness(placement: Placement) -> tuple[int, int]:
    return placement.islands, -placement.per_island


def _groups_of(rank: int, layout: Layout, expert: int, ulysses: int) -> Mapping[str, Sequence[int]]:
    """Return the groups of a rank by axis and role."""
    stage = layout.peers_of(rank, *(axis for axis in layout if axis != "pipeline"))
    context = layout.peers_of(rank, "context")
    groups: dict[str, Sequence[int]] = {axis: layout.peers_of(rank, axis) for axis in layout}
    groups |= {role: layout.peers_of(rank, *axes) for role, axes in ROLES.items()}
    groups |= {"expert": _consecutive(stage, rank, expert), "expert_shard": _across(stage, rank, expert)}
    groups |= {"ulysses": _consecutive(context, rank, ulysses), "ring": _across(context, rank, ulysses)}
    neighbours = groups["tensor"]  # of CPUs; traces name their exchanges through memory so
    return {**groups, "neighbours": neighbours, "world": range(layout.world_size), "stage": stage}


def _consecutive(ranks: Sequence[int], rank: int, size: int) -> Sequence[int]:
    start = ranks.index(rank) // size * size
    return ranks[start : start + size]


def _across(ranks: Sequence[int], rank: int, size: int) -> Sequence[int]:
    return ranks[ranks.index(rank) % size :: size]
