"""The grid: rank order pipe > data > tensor, and groups that cover the world once."""

from itertools import product

import pytest

from megatron_ds.parallel.grid import Coords, Grid, Layout, create_grid
from tests.ranks import run_grid


@pytest.mark.parametrize("layout", [Layout(*sizes) for sizes in product((1, 2, 3), repeat=3)], ids=str)
def test_coordinates_and_ranks_are_inverse(layout: Layout) -> None:
    for rank in range(layout.world_size):
        assert layout.rank_of(*layout.coords(rank)) == rank
    for axes in (("tensor",), ("data",), ("pipeline",), ("pipeline", "tensor")):
        groups = layout.peers(*axes)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        for group in groups:
            fixed = {tuple(getattr(layout.coords(r), a) for a in Coords._fields if a not in axes) for r in group}
            assert len(fixed) == 1


def test_tensor_neighbours_are_adjacent_ranks() -> None:
    layout = Layout(tensor=2, pipeline=2, data=2)
    assert layout.peers("tensor") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert layout.peers("data") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert layout.peers("pipeline") == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_one_rank_needs_no_process_group() -> None:
    grid = create_grid(Layout(), 0)
    for axis in (grid.tensor, grid.pipeline, grid.data, grid.world):
        assert (axis.size, axis.rank, axis.group) == (1, 0, None)


def _axes(grid: Grid) -> dict[str, tuple[int, ...]]:
    return {name: getattr(grid, name).ranks for name in ("tensor", "pipeline", "data", "world")}


def test_groups_on_ranks() -> None:
    seen = run_grid(_axes, Layout(tensor=2, pipeline=2, data=1))
    assert seen[3] == {"tensor": (2, 3), "pipeline": (1, 3), "data": (3,), "world": (0, 1, 2, 3)}
