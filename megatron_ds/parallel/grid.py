"""The grid: which rank sits where along the pipeline, data and tensor axes.

Ranks are ordered pipeline > data > tensor: tensor neighbours are adjacent, because they talk most and should share a
node. `Layout` is arithmetic alone and needs no process; `Grid` adds the process groups. An axis of size 1 has no
group and never touches `torch.distributed`, so a model built with such axes is its own single-process reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

AXES = ("pipeline", "data", "tensor")


class Coords(NamedTuple):
    """Where a rank sits, slowest axis first."""

    pipeline: int
    data: int
    tensor: int


def _cannot(x: Tensor) -> bool:
    return False


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as one rank sees it.

    Attributes:
        size: number of ranks along the axis.
        rank: this rank's place, 0 <= rank < size.
        ranks: the global ranks along the axis, in order.
        group: their process group; None where size is 1.
        sum_here: sums a tensor in place over the axis without the group, where it can; whether it did. See
            `engine.shared_memory`.
    """

    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    sum_here: Callable[[Tensor], bool] = _cannot


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes and the arithmetic between global ranks and coordinates."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def coords(self, rank: int) -> Coords:
        """Global rank -> (pipeline, data, tensor)."""
        assert 0 <= rank < self.world_size, (rank, self)
        return Coords(rank // (self.data * self.tensor), rank // self.tensor % self.data, rank % self.tensor)

    def rank_of(self, pipeline: int, data: int, tensor: int) -> int:
        """(pipeline, data, tensor) -> global rank."""
        return (pipeline * self.data + data) * self.tensor + tensor

    def peers(self, *axes: str) -> list[tuple[int, ...]]:
        """All sets of ranks that differ only along `axes`; together they cover the world once."""
        sizes = {name: getattr(self, name) for name in AXES}
        fixed = [range(size) if name not in axes else range(1) for name, size in sizes.items()]
        moving = [range(size) if name in axes else range(1) for name, size in sizes.items()]
        return [
            tuple(self.rank_of(*(a + b for a, b in zip(base, step))) for step in product(*moving))
            for base in product(*fixed)
        ]


@dataclass(frozen=True)
class Grid:
    """This rank's axes; `world` spans every rank."""

    layout: Layout
    rank: int
    tensor: Axis
    pipeline: Axis
    data: Axis
    world: Axis

    @property
    def coords(self) -> Coords:
        return self.layout.coords(self.rank)


def create_grid(layout: Layout, rank: int) -> Grid:
    """Make the process groups of a layout.

    Collective: every rank of the world calls it, in the same order as other group creations. A layout of one rank
    needs no initialised `torch.distributed`.
    """

    def axis(*names: str) -> Axis:
        mine = Axis()
        for ranks in layout.peers(*names):
            if len(ranks) == 1:
                group = None
            elif len(ranks) == layout.world_size:
                group = dist.group.WORLD
            else:
                group = dist.new_group(list(ranks))
            if rank in ranks:
                mine = Axis(len(ranks), ranks.index(rank), ranks, group)
        return mine

    return Grid(layout, rank, axis("tensor"), axis("pipeline"), axis("data"), axis(*AXES))
