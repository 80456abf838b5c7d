"""The grid: the coordinates of each rank along the parallel axes, and the process groups along them.

`Layout` holds the sizes of the axes and is arithmetic alone; it needs no process. `Grid` adds the process groups. In
the default order, pipeline > data > context > tensor, tensor neighbours are adjacent ranks, because they communicate
most and should share a node; those that divide a sequence, `context`, come next. An axis of size 1 has no group and
never touches `torch.distributed`, so a model built with such axes is its own single-process reference.

Code below asks the grid for a *role*, not for an axis, wherever it means one of these. A role is the set of ranks that
differ along some axes. Roles along the same axes share a process group.

| role      | its ranks                                       | used for                           | context |
| --------- | ----------------------------------------------- | ---------------------------------- | ------- |
| `batch`   | read different samples                          | samplers, micro-batches            | no      |
| `loss`    | compute losses of different tokens              | sums of losses and label counts    | yes     |
| `shard`   | reduce gradients and hold ZeRO's shards         | gradients, states, weights         | yes     |
| `replica` | hold the same parameters; the first writes them | export, checkpoints                | yes     |
| `random`  | draw different dropout masks                    | random streams                     | yes     |

The last column states whether the ranks that divide the sequence are part of the role. Context ranks read the same
samples, but compute different tokens of them with the same parameters, so that for DeepSpeed they are data ranks.

The parameters of experts have ranks of their own. All ranks of a pipeline stage, in order, form groups of `expert`
consecutive ranks, which divide the experts of a layer, whatever axes they differ along (Megatron's folding; Liu et al.
2025). Ranks with the same place in these groups hold the same experts and are `shard` and `replica` of them. As tensor
neighbours are consecutive, the experts of `expert` = tensor ranks lie on the tensor axis, and their replicas are the
role `replica` of all other parameters.

Context ranks exchange heads with `ulysses` neighbours (Jacobs et al. 2023), and keys and values with the ranks of
`ring`, which have the same index among their neighbours; see `context.ContextParallel`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_ds.parallel.neighbours import Neighbours, meet_neighbours

AXES = ("pipeline", "data", "context", "tensor")
"""The axes of a layout, slowest first: the order of the ranks."""

MODEL_AXES = ("tensor",)
"""The axes over which the parameters of one pipeline stage are divided; what is not divided is copied along them."""

EXPERT = "expert"
"""The name of the ranks that divide the experts, among the axes that parameters are divided over."""

ROLES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data",),
    "loss": ("data", "context"),
    "shard": ("data", "context"),
    "replica": ("data", "context"),
    "random": ("data", "context"),
}
"""Role -> the axes along which its ranks differ."""

_GROUP_ORDER = ("tensor", "pipeline", "data")  # the order in which process groups are created; other axes follow


class _ByAxis(Mapping[str, int]):
    """A number for each axis, slowest axis first. The axes that every layout has are attributes too."""

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self._numbers = dict(numbers)

    @property
    def pipeline(self) -> int:
        return self["pipeline"]

    @property
    def data(self) -> int:
        return self["data"]

    @property
    def context(self) -> int:
        return self["context"]

    @property
    def tensor(self) -> int:
        return self["tensor"]

    def __getitem__(self, axis: str) -> int:
        return self._numbers[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and tuple(self.items()) == tuple(other.items())

    def __hash__(self) -> int:
        return hash(tuple(self.items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{axis}={number}' for axis, number in self.items())})"


class Coords(_ByAxis):
    """The coordinates of a rank: its index along each axis, slowest axis first."""


class Layout(_ByAxis):
    """The sizes of the axes, slowest axis first, and the arithmetic between global ranks and coordinates.

    Args:
        order: the axes, slowest first.
        sizes: the number of ranks along each axis; 1 for an axis that is not given.
    """

    def __init__(self, order: Sequence[str] = AXES, /, **sizes: int) -> None:
        assert sizes.keys() <= set(order), (order, sizes)
        assert all(size >= 1 for size in sizes.values()), sizes
        super().__init__({axis: sizes.get(axis, 1) for axis in order})

    @property
    def world_size(self) -> int:
        return prod(self.values())

    def coords(self, rank: int) -> Coords:
        """Return the coordinates of a global rank."""
        assert 0 <= rank < self.world_size, (rank, self)
        numbers, rest = dict.fromkeys(self, 0), rank
        for axis in reversed(list(self)):
            rest, numbers[axis] = divmod(rest, self[axis])
        return Coords(numbers)

    def rank_of(self, **coords: int) -> int:
        """Return the global rank at some coordinates; an axis that is not given has coordinate 0."""
        assert coords.keys() <= self.keys(), (self, coords)
        rank = 0
        for axis, size in self.items():
            rank = rank * size + coords.get(axis, 0)
        return rank

    def peers(self, *axes: str) -> list[tuple[int, ...]]:
        """Return all sets of ranks that differ only along `axes`, each in order. Every rank is in one of them."""
        assert set(axes) <= self.keys(), (self, axes)
        groups = defaultdict(list)
        for rank in range(self.world_size):
            fixed = tuple(number for axis, number in self.coords(rank).items() if axis not in axes)
            groups[fixed].append(rank)
        return [tuple(ranks) for ranks in groups.values()]

    def peers_of(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Return the ranks that differ from `rank` only along `axes`, itself included, in order."""
        found = [0]
        for axis, number in self.coords(rank).items():
            numbers, size = range(self[axis]) if axis in axes else (number,), self[axis]
            found = [before * size + one for before in found for one in numbers]
        return tuple(found)


def _no_local_sum(x: Tensor) -> bool:
    return False


@dataclass(frozen=True)
class Axis:
    """One axis of the grid as seen by one rank.

    Attributes:
        size: the number of ranks along the axis.
        rank: this rank's index along it, 0 <= rank < size.
        ranks: the global ranks along the axis, in order.
        group: their process group; None if size is 1.
        sum_here: a function that sums a tensor in place over the axis without the group, if it can, and returns whether
            it did; see `engine.shared_memory` and `neighbours`.
        neighbours: the same ranks if they gather and scatter through the memory of one machine.
    """

    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    sum_here: Callable[[Tensor], bool] = _no_local_sum
    neighbours: Neighbours | None = None


Axes = Mapping[str, Axis]
"""Some axes of the grid by name."""


class Divided(Protocol):
    """The declaration of a parameter; see `layers.param_spec.ParamSpec`."""

    @property
    def is_of_experts(self) -> bool:
        """It is divided over the expert ranks."""


@dataclass(frozen=True)
class Grid:
    """The axes and roles of one rank. The table at the top of this file states what each role is for.

    Attributes:
        layout: the sizes of the axes.
        rank: this global rank.
        axes: every axis of the layout by name. Code that means a role uses the role.
        world: all ranks.
        host: all ranks, with a group for tensors in host memory: what is known there is agreed without the device.
        batch: the ranks that read different samples.
        loss: the ranks over which losses and label counts are summed.
        shard: the ranks over which ZeRO reduces gradients and shards states.
        replica: the ranks that hold the same parameters, of which the first writes them.
        random: the ranks that draw different dropout masks.
        expert: the ranks that divide the experts of a layer.
        expert_shard: the ranks that hold the same experts: the roles `shard` and `replica` of their parameters.
        ulysses: the context ranks that exchange heads.
        ring: the context ranks that exchange keys and values.
    """

    layout: Layout
    rank: int
    axes: Axes
    world: Axis
    host: Axis
    batch: Axis
    loss: Axis
    shard: Axis
    replica: Axis
    random: Axis
    expert: Axis
    expert_shard: Axis
    ulysses: Axis
    ring: Axis

    @property
    def tensor(self) -> Axis:
        return self.axes["tensor"]

    @property
    def context(self) -> Axis:
        return self.axes["context"]

    @property
    def pipeline(self) -> Axis:
        return self.axes["pipeline"]

    @property
    def model_axes(self) -> Axes:
        """The axes over which the parameters of one pipeline stage are divided or copied; see `MODEL_AXES`.

        Those of experts are divided over `EXPERT` and copied over `expert_shard`, all others over the other axes.
        """
        return {**{name: self.axes[name] for name in MODEL_AXES}, EXPERT: self.expert}

    def shard_of(self, parameter: Divided) -> Axis:
        """Return the ranks of `shard` for a parameter, by its declaration."""
        return self.expert_shard if parameter.is_of_experts else self.shard

    def replica_of(self, parameter: Divided) -> Axis:
        """Return the ranks of `replica` for a parameter, by its declaration."""
        return self.expert_shard if parameter.is_of_experts else self.replica

    @property
    def folds_experts(self) -> bool:
        """The experts are divided over other ranks than those of the tensor axis."""
        return self.expert.ranks != self.tensor.ranks

    @property
    def experts_span_data(self) -> bool:
        """The experts are divided over data ranks, whose forward passes are then collective over them."""
        return self.tensor.size * self.context.size % self.expert.size != 0

    @property
    def coords(self) -> Coords:
        return self.layout.coords(self.rank)

    @property
    def is_first_of_batch(self) -> bool:
        """True on one rank for each of `batch`: a sum over the world to which only these add is one over `batch`."""
        return all(axis.rank == 0 for name, axis in self.axes.items() if name not in ROLES["batch"])


Groups = list[tuple[int, ...]]
"""Sets of ranks, of which every rank is in one."""


def expert_groups(layout: Layout, expert: int) -> tuple[Groups, Groups]:
    """Return all sets of ranks that divide the experts, and all that hold the same ones.

    Args:
        layout: sizes of the axes.
        expert: number of ranks that divide the experts of a layer; it divides the ranks of a pipeline stage.
    """
    return _in_groups_of(expert, layout.peers(*(axis for axis in layout if axis != "pipeline")))


def context_groups(layout: Layout, ulysses: int) -> tuple[Groups, Groups]:
    """Return all sets of context ranks that exchange heads, and all that exchange keys and values.

    Args:
        layout: sizes of the axes.
        ulysses: number of neighbouring context ranks that exchange heads; it divides the context axis.
    """
    return _in_groups_of(ulysses, layout.peers("context"))


def _in_groups_of(size: int, sets: Groups) -> tuple[Groups, Groups]:
    """Return groups of `size` consecutive ranks of each set, and the ranks with the same place in these groups."""
    consecutive, across = [], []
    for ranks in sets:
        groups = [ranks[start : start + size] for start in range(0, len(ranks), size)]
        assert len(groups) * size == len(ranks), (ranks, size)
        consecutive += groups
        across += list(zip(*groups))
    return consecutive, across


def create_grid(layout: Layout, rank: int, expert: int | None = None, ulysses: int | None = None) -> Grid:
    """Create the process groups of a layout. Collective over the world.

    Every rank calls it, in the same order as other group creations. Roles along the same axes share one group. A layout
    of one rank needs no initialised `torch.distributed`.

    Args:
        layout: sizes of the axes.
        rank: this global rank.
        expert: number of ranks that divide the experts of a layer; None = the tensor ranks do.
        ulysses: number of neighbouring context ranks that exchange heads; None = all of them.
    """
    created: dict[tuple[tuple[int, ...], ...], Axis] = {}

    def over(groups: Sequence[tuple[int, ...]]) -> Axis:
        key = tuple(sorted(groups))
        if key not in created:
            created[key] = _create_axis(layout, rank, groups)
        return created[key]

    def along(*names: str) -> Axis:
        return over(layout.peers(*names))

    for name in sorted(layout, key=lambda name: _GROUP_ORDER.index(name) if name in _GROUP_ORDER else len(AXES)):
        along(name)
    roles = {role: along(*names) for role, names in ROLES.items()}
    world = along(*layout)
    divide, same = expert_groups(layout, layout["tensor"] if expert is None else expert)
    exchange, ring = context_groups(layout, layout["context"] if ulysses is None else ulysses)
    roles |= {"expert": over(divide), "expert_shard": over(same), "ulysses": over(exchange), "ring": over(ring)}
    return Grid(layout, rank, {name: along(name) for name in layout}, world, _on_host(world), **roles)


def _on_host(world: Axis) -> Axis:
    """Return the axis of all ranks with a gloo group.

    One group of all ranks serves every sum in host memory, also those over some of them. If NCCL's group has a device,
    torch splits the communicator for each new group, and ranks outside a smaller gloo group would wait for the others.
    """
    if world.size == 1 or dist.get_backend(world.group) == "gloo":
        return world
    return replace(world, group=dist.new_group(backend="gloo"))


def _create_axis(layout: Layout, rank: int, groups: Sequence[tuple[int, ...]]) -> Axis:
    own = Axis()
    for ranks in groups:
        if len(ranks) == 1:
            group = None
        elif len(ranks) == layout.world_size:
            group = dist.group.WORLD
        else:
            group = dist.new_group(list(ranks))
        if rank in ranks:
            own = Axis(len(ranks), ranks.index(rank), ranks, group)
    return own


def stage_ranks(grid: Grid) -> Axis:
    """Return all ranks of this pipeline stage. Collective over the world, if no axis or role has them yet."""
    others = tuple(axis for axis in grid.layout if axis != "pipeline")
    ranks = grid.layout.peers_of(grid.rank, *others)
    known = (grid.world, *grid.axes.values(), grid.shard, grid.expert, grid.expert_shard)
    same = next((axis for axis in known if axis.ranks == ranks), None)
    return same or _create_axis(grid.layout, grid.rank, grid.layout.peers(*others))


def with_neighbours(grid: Grid) -> Grid:
    """Return the grid with a tensor axis that exchanges through memory, if its ranks are all on one Linux machine.

    Collective over the tensor axis. For ranks that compute on CPUs.
    """
    axis = grid.tensor
    neighbours = meet_neighbours(axis.group, axis.rank, axis.size) if axis.group is not None else None
    if neighbours is None:
        return grid
    tensor = replace(axis, neighbours=neighbours, sum_here=neighbours.sum_)
    return replace(grid, axes={**grid.axes, "tensor": tensor})
