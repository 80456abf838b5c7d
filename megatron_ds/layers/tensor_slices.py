"""Slices of a tensor: ranges of elements along each of its dims.

Every layout cuts a tensor differently: tensor parallelism along a dim, ZeRO along its flattened elements. Each cut is a
few slices of the full (logical) tensor, so that what one layout wrote another can read by intersecting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.parallel.grid import Axes


@dataclass(frozen=True)
class TensorSlice:
    """The elements from `start` to `start + shape` along each dim; of a tensor without dims, its only element."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def intersect(self, other: TensorSlice) -> TensorSlice | None:
        """Return the elements that are in both; None if they have no element in common."""
        start = tuple(max(own, others) for own, others in zip(self.start, other.start))
        stop = tuple(
            min(own + size, others + others_size)
            for own, size, others, others_size in zip(self.start, self.shape, other.start, other.shape)
        )
        if any(first >= last for first, last in zip(start, stop)):
            return None
        return TensorSlice(start, tuple(last - first for first, last in zip(start, stop)))

    def index_in(self, outer: TensorSlice) -> tuple[slice, ...]:
        """Return the index of these elements in a tensor that holds the elements of `outer`."""
        return tuple(
            slice(own - base, own - base + size) for own, base, size in zip(self.start, outer.start, self.shape)
        )


def full_slice(shape: tuple[int, ...]) -> TensorSlice:
    """Return all elements of a tensor."""
    return TensorSlice((0,) * len(shape), shape)


def slices_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[TensorSlice]:
    """Yield the elements [start, stop) of a flattened tensor as slices in memory order, each contiguous in memory.

    At most 2n - 1 of them for n dims: the rest of a row, complete rows, the beginning of a row.
    """
    if start >= stop:
        return
    if not shape:
        yield TensorSlice((), ())
        return
    row = prod(shape[1:])
    first_complete, last_complete = -(-start // row), stop // row
    if first_complete > last_complete:  # both ends lie in one row
        yield from _in_row(shape, last_complete, start, stop)
        return
    yield from _in_row(shape, first_complete - 1, start, first_complete * row)
    if first_complete < last_complete:
        yield TensorSlice((first_complete, *(0 for _ in shape[1:])), (last_complete - first_complete, *shape[1:]))
    yield from _in_row(shape, last_complete, last_complete * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[TensorSlice]:
    before = index * prod(shape[1:])
    for part in slices_of_range(shape[1:], start - before, stop - before):
        yield TensorSlice((index, *part.start), (1, *part.shape))


def in_full_tensor(local: TensorSlice, spec: ParamSpec, axes: Axes) -> TensorSlice | None:
    """Translate a slice of this rank's shard into a slice of the full tensor, without padding.

    Args:
        local: within the shard.
        spec: the parameter's declaration.
        axes: those over which it may be divided.

    Returns:
        The slice; None if all of it is padding.
    """
    starts = tuple(start + first for start, (first, _) in zip(local.start, spec.local_ranges(axes)))
    return TensorSlice(starts, local.shape).intersect(full_slice(spec.shape))
