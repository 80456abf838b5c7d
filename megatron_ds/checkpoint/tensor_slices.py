"""Boxes: parts of a tensor whose sides are parallel to its dims.

Every layout cuts a tensor differently: tensor parallelism along a dim, ZeRO along its flattened elements. Each cut is a
few boxes of the whole (logical) tensor, so that what one layout wrote another can read by intersecting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron_ds.layers.param_spec import ParamSpec


@dataclass(frozen=True)
class Box:
    """The elements from `start` to `start + shape`, dim by dim; of a tensor without dims, all of it."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def meet(self, other: Box) -> Box | None:
        """What both have in common; None if nothing."""
        start = tuple(max(mine, theirs) for mine, theirs in zip(self.start, other.start))
        stop = tuple(
            min(mine + size, theirs + other_size)
            for mine, size, theirs, other_size in zip(self.start, self.shape, other.start, other.shape)
        )
        if any(first >= last for first, last in zip(start, stop)):
            return None
        return Box(start, tuple(last - first for first, last in zip(start, stop)))

    def inside(self, outer: Box) -> tuple[slice, ...]:
        """Where it lies in a tensor that holds the elements of `outer`."""
        return tuple(
            slice(mine - base, mine - base + size) for mine, base, size in zip(self.start, outer.start, self.shape)
        )


def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), shape)


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements [start, stop) of a tensor in the order of its memory -> boxes in that order, each of them one piece.

    At most 2n - 1 of them for n dims: the rest of a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # both ends lie in one row
        yield from _in_row(shape, last_whole, start, stop)
        return
    yield from _in_row(shape, first_whole - 1, start, first_whole * row)
    if first_whole < last_whole:
        yield Box((first_whole, *(0 for _ in shape[1:])), (last_whole - first_whole, *shape[1:]))
    yield from _in_row(shape, last_whole, last_whole * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    before = index * prod(shape[1:])
    for box in boxes_of_range(shape[1:], start - before, stop - before):
        yield Box((index, *box.start), (1, *box.shape))


def in_whole(box: Box, spec: ParamSpec, rank: int, size: int) -> Box | None:
    """A box of a tensor rank's share -> of the whole tensor, without padding; None if all of it is padding.

    Args:
        box: within the share.
        spec: the parameter's declaration.
        rank, size: place on the tensor axis.
    """
    if spec.split_dim is None:
        return box
    first, last = spec.local_range(rank, size)
    dim, start = spec.split_dim, list(box.start)
    start[dim] += first
    real = list(spec.shape)
    real[dim] = last
    return Box(tuple(start), box.shape).meet(whole(tuple(real)))
