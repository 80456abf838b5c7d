"""The invertible operation between Hugging Face tensors and one native parameter.

An operation is written down once, as a pattern of named axes, and compiled both ways:

    Op("(k g d) h", "(k one d) h", "(k one d) h", native="(k * d) h")

Each source is viewed with its axes split as written and permuted into the native order, the sources are concatenated
along `*` (the axis that only they disagree on; a single source has none), and the axes are merged as `native` says.
Nothing else is possible, so every operation is a bijection of elements and its inverse needs no code of its own.

A tensor-parallel share is a range of one named axis. It is cut while reading, so a rank reads only its part of a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

Reader = Callable[[int, tuple[slice, ...]], Tensor]
"""(index of a source, one slice a dim) -> that part of the tensor."""

STAR = "*"


@dataclass(frozen=True)
class Op:
    """How native axes are made of the axes of Hugging Face tensors.

    Attributes:
        sources: one pattern a tensor: dims separated by spaces, a dim of several axes in parentheses, slowest first.
        native: pattern of the native parameter, with `*` where the sources are concatenated.
        stacked: for each source, the axis that takes the place of `*`; "" = a new axis of length 1.
    """

    sources: tuple[str, ...]
    native: str
    stacked: tuple[str, ...] = ()

    @property
    def source_dims(self) -> list[list[list[str]]]:
        return [_parse(pattern) for pattern in self.sources]

    @property
    def native_axes(self) -> list[str]:
        return [axis for dim in _parse(self.native) for axis in dim]

    def axes_of(self, source: int) -> list[str]:
        """The native axes in order, with the source's own axis in place of `*` ("" where it has none)."""
        own = self.stacked[source] if self.stacked else ""
        return [own if axis == STAR else axis for axis in self.native_axes]

    def source_shape(self, source: int, sizes: dict[str, int]) -> tuple[int, ...]:
        """Shape of a whole Hugging Face tensor."""
        return tuple(prod(sizes[axis] for axis in dim) for dim in self.source_dims[source])

    def native_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Shape of the whole native parameter."""
        return tuple(
            prod(self._star_size(sizes) if a == STAR else sizes[a] for a in dim) for dim in _parse(self.native)
        )

    def _star_size(self, sizes: dict[str, int]) -> int:
        return sum(self._own_size(source, sizes) for source in range(len(self.sources)))

    def _own_size(self, source: int, sizes: dict[str, int]) -> int:
        own = self.stacked[source] if self.stacked else ""
        return sizes[own] if own else 1

    def split_dim(self, axis: str | None) -> int | None:
        """The native dim whose slowest axis is `axis`: the dim that tensor parallelism divides."""
        if axis is None:
            return None
        for index, dim in enumerate(_parse(self.native)):
            if dim[0] == axis:
                return index
        raise AssertionError(f"axis {axis!r} leads no dim of {self.native!r}")

    def read(self, reader: Reader, sizes: dict[str, int], axis: str | None, start: int, stop: int) -> Tensor:
        """Make the native parameter, or the share [start, stop) of one axis, from parts of the sources."""
        local = dict(sizes) if axis is None else {**sizes, axis: stop - start}
        parts = []
        for source, dims in enumerate(self.source_dims):
            raw = _read_range(partial(reader, source), dims, sizes, axis, start, stop)
            order = [name for dim in dims for name in dim]
            wanted = self.axes_of(source)
            view = raw.reshape([local[name] for name in order])
            view = view.permute([order.index(name) for name in wanted if name])
            parts.append(view.reshape([local[name] if name else 1 for name in wanted]))
        whole = torch.cat(parts, dim=self.native_axes.index(STAR)) if STAR in self.native_axes else parts[0]
        return whole.reshape(self.native_shape(local))

    def write(self, native: Tensor, sizes: dict[str, int]) -> list[Tensor]:
        """The inverse, for a whole native parameter: one contiguous tensor a source."""
        axes = self.native_axes
        view = native.reshape([self._star_size(sizes) if axis == STAR else sizes[axis] for axis in axes])
        if STAR in axes:
            own_sizes = [self._own_size(source, sizes) for source in range(len(self.sources))]
            parts: Sequence[Tensor] = view.split(own_sizes, dim=axes.index(STAR))
        else:
            parts = [view]
        tensors = []
        for source, part in enumerate(parts):
            names = self.axes_of(source)
            part = part.reshape([size for size, name in zip(part.shape, names) if name])
            names = [name for name in names if name]
            order = [name for dim in self.source_dims[source] for name in dim]
            part = part.permute([names.index(name) for name in order])
            tensors.append(part.reshape(self.source_shape(source, sizes)).contiguous())
        return tensors


def copy(pattern: str) -> Op:
    """The same tensor under another name."""
    return Op((pattern,), pattern)


def transpose() -> Op:
    """A Conv1D weight [in, out] as a linear weight [out, in]."""
    return Op(("i o",), "o i")


def _parse(pattern: str) -> list[list[str]]:
    """ "(k g d) h" -> [["k", "g", "d"], ["h"]]."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", pattern)]


def _read_range(
    read: Callable[[tuple[slice, ...]], Tensor],
    dims: list[list[str]],
    sizes: dict[str, int],
    axis: str | None,
    start: int,
    stop: int,
) -> Tensor:
    """Read [start, stop) of one axis of a tensor: one range, or one for each value of the axes slower than it."""
    everything = [slice(0, prod(sizes[name] for name in dim)) for dim in dims]
    place = next((index for index, dim in enumerate(dims) if axis in dim), None)
    if axis is None or place is None or (start, stop) == (0, sizes[axis]):
        return read(tuple(everything))
    position = dims[place].index(axis)
    outer = prod(sizes[name] for name in dims[place][:position])
    inner = prod(sizes[name] for name in dims[place][position + 1 :])
    ranges = []
    for block in range(outer):
        base = block * sizes[axis]
        everything[place] = slice((base + start) * inner, (base + stop) * inner)
        ranges.append(read(tuple(everything)))
    return ranges[0] if outer == 1 else torch.cat(ranges, dim=place)
