"""Slices of ranges: every element once, in order, in few slices; and what two slices have in common."""

import random
from math import prod

import pytest
import torch

from megatron_ds.layers.param_spec import AxisSplit, ParamSpec, over_tensor
from megatron_ds.layers.tensor_slices import TensorSlice, full_slice, in_full_tensor, slices_of_range
from tests.layers.test_param_spec import places
from tests.parallel.axes import axes_at


def test_a_range_is_few_slices_in_order() -> None:
    chance = random.Random(0)
    for _ in range(3000):
        shape = tuple(chance.randrange(1, 6) for _ in range(chance.randrange(1, 5)))
        tensor = torch.arange(prod(shape)).view(shape)
        start = chance.randrange(prod(shape) + 1)
        stop = chance.randrange(start, prod(shape) + 1)
        slices = list(slices_of_range(shape, start, stop))
        found = [tensor[one.index_in(full_slice(shape))].reshape(-1).tolist() for one in slices]
        assert [element for part in found for element in part] == list(range(start, stop))
        assert len(slices) <= 2 * len(shape) - 1
        assert sum(one.numel for one in slices) == stop - start


def test_slices_intersect_where_their_elements_do() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        shape = tuple(chance.randrange(1, 6) for _ in range(3))
        first, second = (_random_slice(chance, shape) for _ in range(2))
        marks = torch.zeros(shape, dtype=torch.int64)
        marks[first.index_in(full_slice(shape))] += 1
        marks[second.index_in(full_slice(shape))] += 1
        common = first.intersect(second)
        assert int((marks == 2).sum()) == (common.numel if common is not None else 0)
        if common is not None:
            assert bool((marks[common.index_in(full_slice(shape))] == 2).all())
            inner = marks[first.index_in(full_slice(shape))]
            assert bool((inner[common.index_in(first)] == 2).all())


def _random_slice(chance: random.Random, shape: tuple[int, ...]) -> TensorSlice:
    start = tuple(chance.randrange(size) for size in shape)
    return TensorSlice(start, tuple(chance.randrange(1, size - begin + 1) for size, begin in zip(shape, start)))


SPECS = [
    ParamSpec((13, 4), over_tensor(0)),
    ParamSpec((3, 14), over_tensor(1)),
    ParamSpec((12, 4), over_tensor(0, 3)),
    ParamSpec((5, 4)),
    ParamSpec((7, 2, 6), (AxisSplit(0, "extra"), AxisSplit(2, "tensor", units=3))),
    ParamSpec((6, 9), (AxisSplit(1, "tensor"), AxisSplit(0, "extra", units=2))),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("extra", [1, 3, 4])
def test_shards_of_all_ranks_are_the_full_tensor_without_padding(spec: ParamSpec, size: int, extra: int) -> None:
    seen = torch.zeros(spec.shape, dtype=torch.int64)
    for place in places(tensor=size, extra=extra):
        axes = axes_at(**place)
        if not spec.holds_first(axes):
            continue
        local = spec.local_shape(axes)
        cut = prod(local) // 2 + 1
        for start, stop in ((0, cut), (cut, prod(local))):
            for one in slices_of_range(local, start, stop):
                real = in_full_tensor(one, spec, axes)
                if real is not None:
                    assert seen[real.index_in(full_slice(spec.shape))].shape == real.shape, "no padding"
                    seen[real.index_in(full_slice(spec.shape))] += 1
    assert bool((seen == 1).all())
