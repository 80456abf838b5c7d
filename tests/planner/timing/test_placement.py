"""Where the ranks of axes and roles lie, against the groups of a layout that is written out."""

import pytest

from megatron_ds.parallel.grid import Layout, context_groups, expert_groups
from megatron_ds.planner.timing.placement import Placement, place


def worst(groups: list[tuple[int, ...]], island: int) -> Placement:
    """The placement of the group that lies worst, of all of them."""
    placed = [Placement.of(ranks, island) for ranks in groups]
    return max(placed, key=lambda one: (one.islands, -one.per_island))


@pytest.mark.parametrize("island", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("layout", "expert", "ulysses"),
    [
        (Layout(pipeline=2, data=4, context=2, tensor=2), 4, 1),
        (Layout(pipeline=2, data=2, context=4, tensor=1), 8, 2),
        (Layout(data=8, tensor=4), 16, 1),
    ],
)
def test_every_axis_lies_as_its_groups_do(layout: Layout, expert: int, ulysses: int, island: int) -> None:
    placed = place(layout, island, expert, ulysses)
    divide, same = expert_groups(layout, expert)
    exchange, ring = context_groups(layout, ulysses)
    groups = {
        **{axis: layout.peers(axis) for axis in layout},
        "shard": layout.peers("data", "context"),
        "expert": divide,
        "expert_shard": same,
        "ulysses": exchange,
        "ring": ring,
        "world": layout.peers(*layout),
    }
    for name, ranks in groups.items():
        if island == 3:  # groups of an axis lie differently there, and two of them are looked at
            assert placed[name] in [Placement.of(one, island) for one in ranks], name
        else:
            assert placed[name] == worst(ranks, island), name


def test_a_large_layout_is_placed_without_its_ranks_being_listed() -> None:
    placed = place(Layout(pipeline=16, data=128, tensor=8), 8)
    assert placed["data"] == Placement(128, 128, 1)
    assert placed["tensor"] == Placement(8, 1, 8)
    assert placed["pipeline"] == Placement(16, 16, 1)


def test_the_island_with_the_fewest_ranks_and_the_worst_group_count() -> None:
    assert Placement.of((0, 1, 2, 3, 4), 4) == Placement(5, 2, 1)
    placed = place(Layout(data=4, tensor=2), 3)
    assert placed["tensor"] == Placement(2, 2, 1), "ranks 0 and 1 share an island, 2 and 3 do not"
