"""Declarations of parameters that several axes divide: shards tile the full tensor, whatever the axes are called."""

import random
from collections.abc import Iterator
from itertools import product

import pytest
import torch

from megatron_ds.engine.gathering import gather_shard
from megatron_ds.hf.family import Row
from megatron_ds.hf.tensor_mapping import Op
from megatron_ds.hf.weights import read_shard
from megatron_ds.layers.param_spec import AxisSplit, ParamSpec, initial_shard, make_parameter, over_tensor, pad_shard
from megatron_ds.parallel.grid import Axes, Grid, Layout
from tests.parallel.axes import ALONE, axes_at
from tests.ranks import run_grid

EXTRA = ("pipeline", "data", "extra", "context", "tensor")  # an axis that no layer knows


def places(**sizes: int) -> Iterator[dict[str, tuple[int, int]]]:
    """The (rank, size) on each axis of every rank, slowest axis first."""
    for ranks in product(*(range(size) for size in sizes.values())):
        yield {name: (rank, size) for (name, size), rank in zip(sizes.items(), ranks)}


def random_spec(chance: random.Random) -> ParamSpec:
    """Up to three dims, none, one or two of them divided, some into units of several elements."""
    shape = [chance.randrange(1, 14) for _ in range(chance.randrange(1, 4))]
    splits = []
    for axis, dim in zip(("tensor", "extra"), chance.sample(range(len(shape)), len(shape))):
        if chance.random() < 0.3:
            continue
        units = chance.choice((None, 1, 2, 3, 4, 6))
        if units is not None:
            shape[dim] = units * chance.randrange(1, 4)
        splits.append(AxisSplit(dim, axis, units))
    chance.shuffle(splits)
    return ParamSpec(tuple(shape), tuple(splits), std=1.0)


def test_shards_tile_the_full_parameter() -> None:
    """Property: of the first holders every element once; all holders of a shard alike; zeros where it is padding."""
    chance, padded, copied = random.Random(0), 0, 0
    for _ in range(400):
        spec, sizes = random_spec(chance), {name: chance.choice((1, 2, 3, 4)) for name in ("extra", "tensor", "other")}
        full = initial_shard("name", spec, 7, ALONE | axes_at(extra=(0, 1)))
        assert full.shape == spec.shape
        seen = torch.zeros(spec.shape, dtype=torch.int64)
        by_range: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}
        for place in places(**sizes):
            axes = axes_at(**place)
            ranges = spec.local_ranges(axes)
            cut = tuple(slice(*bounds) for bounds in ranges)
            shard = initial_shard("name", spec, 7, axes)
            assert shard.shape == spec.local_shape(axes) == make_parameter(spec, axes).shape
            lengths = tuple(slice(0, stop - start) for start, stop in ranges)
            assert torch.equal(shard[lengths], full[cut])
            assert int(shard.count_nonzero()) == full[cut].numel(), "padding is zero, at the end of each dim"
            assert torch.equal(pad_shard(full[cut], spec, axes), shard)
            if full[cut].numel():
                assert torch.equal(by_range.setdefault(ranges, shard), shard)
            seen[cut] += spec.holds_first(axes)
            padded += full[cut].numel() < shard.numel()
            copied += not spec.holds_first(axes)
        assert bool((seen == 1).all()), (spec, sizes)
    assert padded > 100 and copied > 1000, "the cases are not empty"


def test_deepspeed_counts_what_first_holders_have() -> None:
    """Its rule for the gradient norm: flagged parameters on every rank, others on the first of the model axes."""
    chance, flagged = random.Random(1), 0
    for _ in range(200):
        spec, sizes = random_spec(chance), {name: chance.choice((1, 2, 4)) for name in ("extra", "tensor")}
        for place in places(**sizes):
            axes = axes_at(**place)
            is_flagged = hasattr(make_parameter(spec, axes), "tensor_model_parallel")
            is_first = all(axis.rank == 0 for axis in axes.values())
            assert (is_flagged or is_first) == spec.holds_first(axes), (spec, place)
            flagged += is_flagged and not is_first
    assert flagged > 200


def test_neighbours_hold_a_shard_that_units_do_not_divide_further() -> None:
    spec = ParamSpec((6, 5), (AxisSplit(0, "extra", units=2), *over_tensor(1)))
    found = [spec.local_ranges(axes_at(**place)) for place in places(extra=4, tensor=2)]
    assert found == [((3 * (e // 2), 3 * (e // 2) + 3), (3 * t, min(5, 3 * t + 3))) for e in range(4) for t in range(2)]
    first = [spec.holds_first(axes_at(**place)) for place in places(extra=4, tensor=2)]
    assert first == [True, True, False, False, True, True, False, False]
    assert spec.num_shards("extra", 4) == 2 and spec.num_shards("tensor", 2) == 2 and spec.num_shards("other", 2) == 1


@pytest.mark.parametrize(
    "splits",
    [
        (AxisSplit(0, "tensor"), AxisSplit(0, "extra")),
        (AxisSplit(0, "tensor"), AxisSplit(1, "tensor")),
        (AxisSplit(2, "tensor"),),
    ],
)
def test_a_dim_and_an_axis_stand_in_one_split(splits: tuple[AxisSplit, ...]) -> None:
    with pytest.raises(AssertionError):
        ParamSpec((4, 4), splits)


def test_shards_are_read_along_every_split() -> None:
    """From a Hugging Face tensor, whose table names the dim that the tensor axis divides."""
    spec = ParamSpec((12, 5), (*over_tensor(0, 3), AxisSplit(1, "extra")))
    theirs = torch.arange(60.0).view(5, 12) + 1
    row = Row("w", ("w",), Op(("h (k d)",), "(k d) h"), "k")
    for place in places(extra=3, tensor=2):
        axes = axes_at(**place)
        shard = read_shard(row, {"h": 5, "k": 3, "d": 4}, lambda source: theirs, spec, axes)
        cut = theirs.t()[tuple(slice(*bounds) for bounds in spec.local_ranges(axes))]
        assert torch.equal(shard, pad_shard(cut, spec, axes)), place


GATHERED = [
    ParamSpec((7, 5), (AxisSplit(0, "extra"), AxisSplit(1, "tensor")), std=1.0),
    ParamSpec((4, 6), (*over_tensor(1, 3), AxisSplit(0, "extra", units=1)), std=1.0),
    ParamSpec((3, 5), (AxisSplit(1, "extra"),), std=1.0),
    ParamSpec((9, 2), over_tensor(0), std=1.0),
    ParamSpec((4, 3), over_tensor(0, 2), std=1.0),
    ParamSpec((4,), std=1.0),
]


def _gather(grid: Grid, to: dict[str, int]) -> list[torch.Tensor | None]:
    axes: Axes = {name: grid.axes[name] for name in ("extra", "tensor")}
    return [gather_shard(initial_shard("w", spec, 3, axes), spec, axes, to) for spec in GATHERED]


@pytest.mark.parametrize(
    ("layout", "to"),
    [
        (Layout(EXTRA, extra=2, tensor=2), {}),
        (Layout(EXTRA, extra=2, tensor=2), {"tensor": 1}),
        (Layout(EXTRA, extra=2, tensor=2), {"extra": 1, "tensor": 1}),
        (Layout(EXTRA, tensor=4), {"tensor": 2}),
    ],
    ids=str,
)
def test_shards_are_gathered_on_one_rank_over_every_axis(layout: Layout, to: dict[str, int]) -> None:
    for rank, found in enumerate(run_grid(_gather, layout, to)):
        for spec, full in zip(GATHERED, found):
            if rank != layout.rank_of(**to):
                assert full is None
            else:
                assert full is not None
                assert torch.equal(full, initial_shard("w", spec, 3, axes_at(extra=(0, 1), tensor=(0, 1))))
