"""The grid: rank order pipeline > data > context > tensor, groups that cover the world once, roles, and other axes."""

from itertools import product

import pytest

from megatron_ds.parallel.grid import AXES, ROLES, Grid, Layout, context_groups, create_grid
from megatron_ds.parallel.rank_info import RankInfo
from tests.ranks import run_grid, run_ranks

EXTRA = ("pipeline", "data", "extra", "context", "tensor")  # an axis of no issue, between others


@pytest.mark.parametrize(
    "layout",
    [Layout(tensor=t, pipeline=p, data=d) for t, p, d in product((1, 2, 3), repeat=3)]
    + [Layout(tensor=2, pipeline=2, data=2, context=c) for c in (2, 3)]
    + [Layout(EXTRA, tensor=2, pipeline=2, data=3, extra=e) for e in (1, 2, 3)]
    + [Layout(("extra", *AXES), tensor=2, data=2, extra=2)],
    ids=str,
)
def test_coordinates_and_ranks_are_inverse(layout: Layout) -> None:
    for rank in range(layout.world_size):
        assert layout.rank_of(**layout.coords(rank)) == rank
    everything = [*layout]
    for axes in (("tensor",), ("data",), ("pipeline",), ("pipeline", "tensor"), everything[:2], everything):
        groups = layout.peers(*axes)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        for group in groups:
            fixed = {tuple(layout.coords(r)[a] for a in layout if a not in axes) for r in group}
            assert len(fixed) == 1
            assert all(layout.peers_of(rank, *axes) == group for rank in group)


def test_tensor_neighbours_are_adjacent_ranks() -> None:
    layout = Layout(tensor=2, pipeline=2, data=2)
    assert layout.peers("tensor") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert layout.peers("data") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert layout.peers("pipeline") == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_another_axis_stands_where_the_order_says() -> None:
    layout = Layout(EXTRA, tensor=2, pipeline=1, data=2, extra=3)
    assert dict(layout) == {"pipeline": 1, "data": 2, "extra": 3, "context": 1, "tensor": 2} and [*layout] == [*EXTRA]
    assert layout.peers("extra") == [(0, 2, 4), (1, 3, 5), (6, 8, 10), (7, 9, 11)]
    assert layout.peers("data", "extra") == [(0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)]
    assert layout.rank_of(data=1, extra=2) == 10
    assert dict(layout.coords(11)) == {"pipeline": 0, "data": 1, "extra": 2, "context": 0, "tensor": 1}


def test_layouts_are_equal_by_order_and_sizes() -> None:
    assert Layout(tensor=2) == Layout(data=1, tensor=2) and hash(Layout(tensor=2)) == hash(Layout(data=1, tensor=2))
    assert Layout(tensor=2) != Layout(EXTRA, tensor=2) != Layout(("extra", *AXES), tensor=2)
    assert Layout(tensor=2) != Layout(data=2)
    with pytest.raises(AssertionError, match="extra"):
        Layout(extra=2)


def test_one_rank_needs_no_process_group() -> None:
    grid = create_grid(Layout(), 0)
    for axis in (*grid.axes.values(), grid.world, grid.batch, grid.loss, grid.shard, grid.replica, grid.random):
        assert (axis.size, axis.rank, axis.group) == (1, 0, None)


def _axes(grid: Grid) -> dict[str, tuple[int, ...]]:
    return {**{name: axis.ranks for name, axis in grid.axes.items()}, "world": grid.world.ranks}


def test_groups_on_ranks() -> None:
    seen = run_grid(_axes, Layout(tensor=2, pipeline=2, data=1))
    assert seen[3] == {"tensor": (2, 3), "pipeline": (1, 3), "data": (3,), "context": (3,), "world": (0, 1, 2, 3)}


def _context_axes(grid: Grid) -> tuple[tuple[int, ...], ...]:
    axes = (grid.context, grid.ulysses, grid.ring, grid.batch, grid.shard, grid.loss, grid.replica, grid.random)
    return tuple(axis.ranks for axis in axes)


def test_context_ranks_share_samples_and_shards_but_no_tokens() -> None:
    def on_grid(info: RankInfo) -> tuple[tuple[int, ...], ...]:
        return _context_axes(create_grid(Layout(tensor=1, data=2, context=4), info.rank, ulysses=2))

    everyone = tuple(range(8))
    seen = run_ranks(on_grid, 8)
    assert seen[5] == ((4, 5, 6, 7), (4, 5), (5, 7), (1, 5), everyone, everyone, everyone, everyone)
    assert seen[2] == ((0, 1, 2, 3), (2, 3), (0, 2), (2, 6), everyone, everyone, everyone, everyone)


def test_groups_of_heads_and_of_the_ring() -> None:
    layout = Layout(tensor=2, context=4)
    assert context_groups(layout, 2) == ([(0, 2), (4, 6), (1, 3), (5, 7)], [(0, 4), (2, 6), (1, 5), (3, 7)])
    assert context_groups(layout, 4) == (layout.peers("context"), [(rank,) for rank in (0, 2, 4, 6, 1, 3, 5, 7)])
    assert context_groups(layout, 1) == ([(rank,) for rank in (0, 2, 4, 6, 1, 3, 5, 7)], layout.peers("context"))


def _groups_in_order(info: object, layout: Layout, rank_of_interest: int) -> list[tuple[int, ...]]:
    import torch.distributed as dist

    created: list[tuple[int, ...]] = []
    new_group = dist.new_group

    def recorded(ranks: list[int]) -> dist.ProcessGroup:
        created.append(tuple(ranks))
        return new_group(ranks)

    dist.new_group = recorded
    grid = create_grid(layout, dist.get_rank())
    for role in ROLES:
        assert getattr(grid, role) is grid.axes["data"], role
    return created


def test_roles_share_the_groups_of_axes_which_are_created_in_a_fixed_order() -> None:
    """On the wire the order counts: gloo and NCCL match groups between ranks by it."""
    for created in run_ranks(_groups_in_order, 4, Layout(tensor=2, pipeline=1, data=2), 0):
        assert created == [(0, 1), (2, 3), (0, 2), (1, 3)]
    for created in run_ranks(_groups_in_order, 4, Layout(EXTRA, tensor=2, extra=2), 0):
        assert created == [(0, 1), (2, 3), (0, 2), (1, 3)]
    for created in run_ranks(_groups_in_order, 6, Layout(EXTRA, pipeline=3, extra=2), 0):
        assert created == [(0, 2, 4), (1, 3, 5), (0, 1), (2, 3), (4, 5)]
