"""One declaration per parameter: its full shape, the axes that divide it, its initial value, whether it decays.

Parameter flags for DeepSpeed, initialisation, weight decay, Hugging Face import and export all read this declaration,
so they cannot disagree. It stays on the tensor when ZeRO-3 flattens the data.

The functions here take the axes by name (`Grid.model_axes`, `TensorParallel.axes`). An axis that divides no dim of a
parameter holds copies of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from math import gcd, prod

import torch
from torch import Tensor, nn

from megatron_ds.parallel.grid import EXPERT, Axes, Axis
from megatron_ds.parallel.random import derive_seed

TILE_ELEMENTS = 2**22
"""The largest tile of an initial value; see `initial_shard`. Values of larger parameters depend on it."""


UNTRAINED = frozenset({"choice_bias", "beta", "eps"})
"""Last parts of the names of weights that are no parameters: of routers' choices, and constants of activations."""


def is_untrained(name: str) -> bool:
    """Test whether the weight of this name is no parameter: it has no gradient, and counts of parameters omit it."""
    return name.rpartition(".")[2] in UNTRAINED


@dataclass(frozen=True)
class AxisSplit:
    """A dim of a parameter that an axis divides into contiguous shards of equal length, padded at the end.

    Attributes:
        dim: the dim.
        axis: the axis.
        units: the number of indivisible units that the dim consists of (key and value heads); None = it may be divided
            anywhere. If the axis has more ranks than the units divide into, there are fewer shards than ranks, and
            neighbours hold the same one.
    """

    dim: int
    axis: str
    units: int | None = None

    def num_shards(self, size: int) -> int:
        """Return the number of different shards on an axis of `size` ranks."""
        return gcd(self.units, size) if self.units is not None else size

    def shard_index(self, axis: Axis) -> int:
        """Return which of the shards a rank of the axis holds."""
        return axis.rank * self.num_shards(axis.size) // axis.size


def over_tensor(dim: int, units: int | None = None) -> tuple[AxisSplit, ...]:
    """Return the splits of a parameter of which the tensor axis alone divides one dim; see `AxisSplit`."""
    return (AxisSplit(dim, "tensor", units),)


def over_experts() -> tuple[AxisSplit, ...]:
    """Return the splits of a parameter of all experts of a layer, whose dim 0 is divided over the expert ranks."""
    return (AxisSplit(0, EXPERT),)


Range = tuple[int, int]
"""[start, stop)."""


@dataclass(frozen=True)
class Matrices:
    """The matrices, each of a linear map, that a parameter of shape (..., R, C) consists of.

    There is one (R, C) matrix for each index of the leading dims; or the rows of several alternate in blocks, as those
    of the keys and values of each head do. An optimizer that updates matrices as a whole needs this; see
    `engine.optimizers.muon`.

    Attributes:
        alternating: number of matrices whose rows alternate; then there are no leading dims.
        block_rows: rows of one of them in each block; 0 = rows do not alternate.
    """

    alternating: int = 1
    block_rows: int = 0

    def view_ranges(self, ranges: Sequence[Range], shape: Sequence[int]) -> tuple[Range, Range, Range, Range]:
        """Translate the ranges of a shard into those of a view with four dims: blocks, matrices, rows, columns.

        The rows of one matrix are the first and the third dim. A shard is contiguous in the view as in the parameter.

        Args:
            ranges: for each dim, the [start, stop) of the parameter.
            shape: of the full parameter.
        """
        *leading, rows, columns = ranges
        if self.alternating > 1:
            block = self.alternating * self.block_rows
            assert not leading and rows[0] % block == rows[1] % block == 0, (self, ranges)
            return (rows[0] // block, rows[1] // block), (0, self.alternating), (0, self.block_rows), columns
        first, count = 0, 1
        for (start, stop), length in zip(leading, shape):
            assert count == 1 or stop - start == length, (self, ranges, shape)
            first, count = first * length + start, count * (stop - start)
        return (0, 1), (first, first + count), rows, columns


@dataclass(frozen=True)
class ParamSpec:
    """The declaration of a parameter; it does not depend on the layout.

    Attributes:
        shape: the full (logical) shape, without vocabulary padding.
        splits: the dims that are divided, each over an axis of its own; empty = every rank holds the full parameter.
        std: standard deviation of its normal initialisation; None = not normal.
        bound: it is initialised uniformly within ±bound, if `std` is None.
        fill: the constant that it is initialised with if both are None.
        decay: whether Adam's weight decay applies (not to biases and norms).
        matrices: the matrices of linear maps that it consists of, or the vectors that are added to what these return;
            None = it is no such map: an embedding, an output head, a norm, another bias.
    """

    shape: tuple[int, ...]
    splits: tuple[AxisSplit, ...] = ()
    std: float | None = None
    fill: float = 0.0
    decay: bool = True
    bound: float | None = None
    matrices: Matrices | None = None

    def __post_init__(self) -> None:
        dims = [split.dim for split in self.splits]
        assert len({*dims}) == len({split.axis for split in self.splits}) == len(dims), self
        assert all(0 <= dim < len(self.shape) for dim in dims), self

    @property
    def numel(self) -> int:
        """The number of elements of the full parameter."""
        return prod(self.shape)

    @property
    def full_ranges(self) -> tuple[Range, ...]:
        """The range of every dim."""
        return tuple((0, length) for length in self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int] | None:
        """Rows and columns of each of its `matrices`; None if it has no matrices, or vectors instead."""
        if self.matrices is None or len(self.shape) < 2:
            return None
        (_, blocks), _, (_, rows), (_, columns) = self.matrices.view_ranges(self.full_ranges, self.shape)
        return (blocks * rows, columns) if min(blocks * rows, columns) > 1 else None

    def split_over(self, axis: str) -> AxisSplit | None:
        """Return the split over an axis; None if the axis holds copies."""
        return next((split for split in self.splits if split.axis == axis), None)

    def num_shards(self, axis: str, size: int) -> int:
        """Return the number of different shards that `size` ranks along an axis hold: 1 if they hold copies."""
        split = self.split_over(axis)
        return split.num_shards(size) if split is not None else 1

    @property
    def is_of_experts(self) -> bool:
        """It is divided over the expert ranks, which takes the place of all other axes."""
        return self.split_over(EXPERT) is not None

    def axes_among(self, axes: Axes) -> Axes:
        """Return the axes over which the parameter is divided or copied: the expert ranks, or all others."""
        return {name: axis for name, axis in axes.items() if (name == EXPERT) == self.is_of_experts}

    def holds_first(self, axes: Axes) -> bool:
        """Return whether this rank is the first, along its axes among `axes`, of those that hold its shard.

        Over the ranks that do, sums and files contain every element of the parameter once.
        """
        own = self.axes_among(axes)
        return all(axis.rank % (axis.size // self.num_shards(name, axis.size)) == 0 for name, axis in own.items())

    def local_shape(self, axes: Axes) -> tuple[int, ...]:
        """Return the shape of the shard of every rank, padding included."""
        shape = list(self.shape)
        for split in self.splits:
            shape[split.dim] = -(-shape[split.dim] // split.num_shards(axes[split.axis].size))
        return tuple(shape)

    def local_ranges(self, axes: Axes) -> tuple[Range, ...]:
        """Return, for each dim, the [start, stop) of the full parameter that this rank holds.

        Shards are rounded up in length, so that the last ones may be shorter without their padding, or all padding:
        then start = stop.
        """
        ranges, padded = list(self.full_ranges), self.local_shape(axes)
        for split in self.splits:
            index, full = split.shard_index(axes[split.axis]), self.shape[split.dim]
            start, stop = index * padded[split.dim], (index + 1) * padded[split.dim]
            ranges[split.dim] = min(start, full), min(stop, full)
        return tuple(ranges)


def make_parameter(spec: ParamSpec, axes: Axes) -> nn.Parameter:
    """Allocate this rank's shard of a parameter, unfilled, in torch's default dtype and device.

    It sets `tensor_model_parallel` on shards; where several ranks hold the same shard, on the first of them only.
    DeepSpeed's gradient norm counts flagged parameters on every rank, and others on the first rank of a model-parallel
    group, so that every element counts once, as in `ParamSpec.holds_first`.
    """
    parameter = nn.Parameter(torch.empty(spec.local_shape(axes)))
    parameter.spec = spec  # type: ignore[attr-defined]
    if any(axes[split.axis].size > 1 for split in spec.splits) and spec.holds_first(axes):
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


def spec_of(parameter: Tensor) -> ParamSpec:
    """Return the declaration of a parameter. Every parameter of a model core has one."""
    return parameter.spec  # type: ignore[attr-defined]


def pad_shard(shard: Tensor, spec: ParamSpec, axes: Axes) -> Tensor:
    """Append the zero padding that gives a slice of the full parameter the shape of every rank's shard."""
    shape = spec.local_shape(axes)
    if shard.shape == shape:
        return shard
    padded = shard.new_zeros(shape)
    padded[tuple(slice(0, length) for length in shard.shape)] = shard
    return padded


def initial_shard(name: str, spec: ParamSpec, seed: int, axes: Axes) -> Tensor:
    """Return this rank's shard of a parameter's initial value, fp32 on CPU, padding included.

    The full tensor consists of tiles that do not depend on the layout, each drawn from a generator seeded by (seed,
    name, tile); each expert has tiles of its own. A rank draws the tiles that its shard touches, on as many threads as
    torch uses, so the weights depend on neither layout nor the order in which parameters are filled, and no rank holds
    a full tensor of several tiles.
    """
    ranges = spec.local_ranges(axes)
    if spec.std is None and spec.bound is None:
        return pad_shard(torch.full([stop - start for start, stop in ranges], spec.fill), spec, axes)
    shard = torch.zeros(spec.local_shape(axes))
    tile_shape = _tile_shape((1, *spec.shape[1:]) if spec.is_of_experts else spec.shape)
    is_only_tile = tile_shape == spec.shape

    def fill(index: tuple[int, ...]) -> None:
        begins = [place * length for place, length in zip(index, tile_shape)]
        ends = [min(begin + length, full) for begin, length, full in zip(begins, tile_shape, spec.shape)]
        shared = [(max(begin, start), min(end, stop)) for begin, end, (start, stop) in zip(begins, ends, ranges)]
        tile_seed = derive_seed("init", seed, name) if is_only_tile else derive_seed("init", seed, name, index)
        tile = _draw([end - begin for begin, end in zip(begins, ends)], spec, tile_seed)
        inside = tuple(slice(low - begin, high - begin) for (low, high), begin in zip(shared, begins))
        shard[tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(shared, ranges))] = tile[inside]

    touched = list(product(*(range(a // n, -(-b // n)) if a < b else () for (a, b), n in zip(ranges, tile_shape))))
    num_threads = min(torch.get_num_threads(), len(touched))
    if num_threads <= 1:
        for index in touched:
            fill(index)
        return shard
    with ThreadPoolExecutor(num_threads) as pool:  # torch draws without Python's lock
        list(pool.map(fill, touched))
    return shard


def _tile_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the tiles of a tensor: its largest dim is halved until one has at most `TILE_ELEMENTS`."""
    lengths = list(shape)
    while prod(lengths) > TILE_ELEMENTS:
        largest = lengths.index(max(lengths))
        lengths[largest] = -(-lengths[largest] // 2)
    return tuple(lengths)


def _draw(shape: Sequence[int], spec: ParamSpec, seed: int) -> Tensor:
    """Draw a tensor from the distribution of a parameter's initial value, fp32 on CPU."""
    values, generator = torch.empty(shape), torch.Generator().manual_seed(seed)
    if spec.std is not None:
        return values.normal_(0.0, spec.std, generator=generator)
    assert spec.bound is not None
    return values.uniform_(-spec.bound, spec.bound, generator=generator)
