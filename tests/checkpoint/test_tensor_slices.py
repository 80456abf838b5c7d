"""Boxes of ranges: every element once, in order, in few pieces; and what two boxes have in common."""

import random
from math import prod

import pytest
import torch

from megatron_ds.checkpoint.tensor_slices import Box, boxes_of_range, in_whole, whole
from megatron_ds.layers.param_spec import ParamSpec


def test_a_range_is_few_boxes_in_order() -> None:
    chance = random.Random(0)
    for _ in range(3000):
        shape = tuple(chance.randrange(1, 6) for _ in range(chance.randrange(1, 5)))
        tensor = torch.arange(prod(shape)).view(shape)
        start = chance.randrange(prod(shape) + 1)
        stop = chance.randrange(start, prod(shape) + 1)
        boxes = list(boxes_of_range(shape, start, stop))
        found = [tensor[box.inside(whole(shape))].reshape(-1).tolist() for box in boxes]
        assert [element for part in found for element in part] == list(range(start, stop))
        assert len(boxes) <= 2 * len(shape) - 1
        assert sum(box.numel for box in boxes) == stop - start


def test_boxes_meet_where_their_elements_do() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        shape = tuple(chance.randrange(1, 6) for _ in range(3))
        first, second = (_random_box(chance, shape) for _ in range(2))
        marks = torch.zeros(shape, dtype=torch.int64)
        marks[first.inside(whole(shape))] += 1
        marks[second.inside(whole(shape))] += 1
        common = first.meet(second)
        assert int((marks == 2).sum()) == (common.numel if common is not None else 0)
        if common is not None:
            assert bool((marks[common.inside(whole(shape))] == 2).all())
            inner = marks[first.inside(whole(shape))]
            assert bool((inner[common.inside(first)] == 2).all())


def _random_box(chance: random.Random, shape: tuple[int, ...]) -> Box:
    start = tuple(chance.randrange(size) for size in shape)
    return Box(start, tuple(chance.randrange(1, size - begin + 1) for size, begin in zip(shape, start)))


@pytest.mark.parametrize(
    "spec", [ParamSpec((13, 4), 0), ParamSpec((3, 14), 1), ParamSpec((12, 4), 0, units=3)], ids=str
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_of_all_ranks_are_the_whole_without_padding(spec: ParamSpec, size: int) -> None:
    seen = torch.zeros(spec.shape, dtype=torch.int64)
    for rank in range(size):
        if not spec.holds_first(rank, size):
            continue
        local = spec.local_shape(size)
        cut = prod(local) // 2 + 1
        for start, stop in ((0, cut), (cut, prod(local))):
            for box in boxes_of_range(local, start, stop):
                real = in_whole(box, spec, rank, size)
                if real is not None:
                    seen[real.inside(whole(spec.shape))] += 1
    assert bool((seen == 1).all())
