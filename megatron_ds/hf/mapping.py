"""The invertible operation between Hugging Face tensors and one native parameter.

An operation is written down once, as patterns of named axes, and carried out both ways:

    Op(("(k g d) h", "(k d) h", "(k d) h"), native="(k * d) h", stacked=("g", "", ""))

Each source is viewed with its axes split as written and permuted into the native order, the sources are concatenated
along `*` (the axis that only they disagree on; a single source has none), and the axes are merged as `native` says.
Nothing else is possible, so every operation is a bijection of elements and its inverse needs no code of its own.

A tensor-parallel share is a range of one named axis. It is cut while reading, so a rank reads only its part of a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod

import torch
from torch import Tensor

Reader = Callable[[int, tuple[slice, ...]], Tensor]
"""(index of a source, one slice a dim) -> that part of the tensor."""

Dims = tuple[tuple[str, ...], ...]
"""The axes of each dim, slowest first."""

STAR = "*"


@dataclass(frozen=True)
class Op:
    """How native axes are made of the axes of Hugging Face tensors.

    Attributes:
        sources: one pattern a tensor: dims separated by spaces, a dim of several axes in parentheses, slowest first.
        native: pattern of the native parameter, with `*` where the sources are concatenated.
        stacked: for each source, the axis that takes the place of `*`; "" = a new axis of length 1. Left out: "" each.
    """

    sources: tuple[str, ...]
    native: str
    stacked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not self.stacked or len(self.stacked) == len(self.sources), self
        assert self.native_axes.count(STAR) == (len(self.sources) > 1), f"{self}: * stands for several sources"
        for source in range(len(self.sources)):
            given, wanted = _flat(self._dims(source)), [axis for axis in self._axes(source) if axis]
            assert sorted(given) == sorted(wanted), f"{self}: source {source} has axes {given}, native takes {wanted}"
            assert len(set(given)) == len(given), f"{self}: an axis stands twice in source {source}"

    @property
    def native_axes(self) -> list[str]:
        """All axes of the native parameter, slowest first."""
        return _flat(_parse(self.native))

    def source_shape(self, source: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of a whole Hugging Face tensor."""
        return tuple(prod(sizes[axis] for axis in dim) for dim in self._dims(source))

    def native_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the whole native parameter."""
        sizes = {**sizes, STAR: sum(self._star_sizes(sizes))}
        return tuple(prod(sizes[axis] for axis in dim) for dim in _parse(self.native))

    def split_dim(self, axis: str | None) -> int | None:
        """The native dim whose slowest axis is `axis`: the dim that tensor parallelism divides."""
        if axis is None:
            return None
        for index, dim in enumerate(_parse(self.native)):
            if dim[0] == axis:
                return index
        raise AssertionError(f"axis {axis!r} leads no dim of {self.native!r}")

    def read(self, reader: Reader, sizes: Mapping[str, int], axis: str | None, start: int, stop: int) -> Tensor:
        """Make the native parameter, or the share [start, stop) of one axis, from parts of the sources.

        Reads no element twice and none outside the share. The result may share memory with what `reader` gave.
        """
        local = dict(sizes) if axis is None else {**sizes, axis: stop - start}
        parts = []
        for source in range(len(self.sources)):
            dims = self._dims(source)
            raw = _read_range(partial(reader, source), dims, sizes, axis, start, stop)
            order, wanted = _flat(dims), self._axes(source)
            view = raw.reshape([local[name] for name in order])
            view = view.permute([order.index(name) for name in wanted if name])
            parts.append(view.reshape([local[name] if name else 1 for name in wanted]))
        whole = torch.cat(parts, dim=self.native_axes.index(STAR)) if len(parts) > 1 else parts[0]
        return whole.reshape(self.native_shape(local))

    def write(self, native: Tensor, sizes: Mapping[str, int]) -> Iterator[Tensor]:
        """The inverse, for a whole native parameter: one tensor a source, each made when it is asked for.

        They may be views of `native`, and need not be contiguous.
        """
        view, parts = native, [native]
        if STAR in self.native_axes:
            star_sizes = self._star_sizes(sizes)
            local = {**sizes, STAR: sum(star_sizes)}
            view = native.reshape([local[axis] for axis in self.native_axes])
            parts = list(view.split(star_sizes, dim=self.native_axes.index(STAR)))
        for source, part in enumerate(parts):
            names = [name for name in self._axes(source) if name]
            part = part.reshape([sizes[name] for name in names])
            part = part.permute([names.index(name) for name in _flat(self._dims(source))])
            yield part.reshape(self.source_shape(source, sizes))

    def _dims(self, source: int) -> Dims:
        return _parse(self.sources[source])

    def _axes(self, source: int) -> list[str]:
        """The native axes in order, with the source's own axis in place of `*` ("" where it has none)."""
        own = self.stacked[source] if self.stacked else ""
        return [own if axis == STAR else axis for axis in self.native_axes]

    def _star_sizes(self, sizes: Mapping[str, int]) -> list[int]:
        """How much of `*` each source fills."""
        return [sizes[own] if own else 1 for own in self.stacked or [""] * len(self.sources)]


def copy(pattern: str) -> Op:
    """The same tensor under another name."""
    return Op((pattern,), pattern)


@cache
def _parse(pattern: str) -> Dims:
    """ "(k g d) h" -> (("k", "g", "d"), ("h",))."""
    return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", pattern))


def _flat(dims: Dims) -> list[str]:
    return [axis for dim in dims for axis in dim]


def _read_range(
    read: Callable[[tuple[slice, ...]], Tensor],
    dims: Sequence[Sequence[str]],
    sizes: Mapping[str, int],
    axis: str | None,
    start: int,
    stop: int,
) -> Tensor:
    """Read [start, stop) of one axis of a tensor: one range, or one for each value of the axes slower than it."""
    ranges = [slice(0, prod(sizes[name] for name in dim)) for dim in dims]
    place = next((index for index, dim in enumerate(dims) if axis in dim), None)
    if axis is None or place is None or (start, stop) == (0, sizes[axis]):
        return read(tuple(ranges))
    position = dims[place].index(axis)
    outer = prod(sizes[name] for name in dims[place][:position])
    inner = prod(sizes[name] for name in dims[place][position + 1 :])
    blocks = []
    for block in range(outer):
        base = block * sizes[axis]
        ranges[place] = slice((base + start) * inner, (base + stop) * inner)
        blocks.append(read(tuple(ranges)))
    return blocks[0] if outer == 1 else torch.cat(blocks, dim=place)
