"""The invertible operation between Hugging Face tensors and one native parameter.

An operation is written once, as patterns of named axes, and applied in both directions:

    Op(("(k d) h", "(k d) h"), native="(k * d) h")

Each source is viewed with its axes split as written and permuted into the native order, the sources are stacked along
`*` (a new axis with one entry per source), and the axes are merged as `native` says. A fused tensor holds several
pieces, and a native parameter takes some of them; brackets give their order:

    QKV = "(k [g|1|1] d) h"                                     for each key head: its queries, the key, the value
    Op((FusedPiece(QKV, 0),), native="(k g d) h")                             the queries
    Op((FusedPiece(QKV, 1), FusedPiece(QKV, 2)), native="(k * d) h")          for each key head: its key, its value

Nothing else is possible, so every operation is a bijection of elements and its inverse needs no code of its own.

Sources are views of files, so only accessed pages are read. A tensor-parallel shard is a range of one named axis: it is
cut from the view before anything is copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

Reader = Callable[[int], Tensor]
"""Index of a source -> the full tensor, as a view of its file."""

Sizes = Mapping[str, int]
"""Axis -> its size."""

STAR = "*"


@dataclass(frozen=True)
class FusedPiece:
    """One piece of a fused tensor: the pattern of the full tensor, and the index of the piece in its bracket."""

    pattern: str
    piece: int


@dataclass(frozen=True)
class _Dim:
    """One dim of a pattern: outer axes, consecutive pieces, inner axes, slowest first. Most dims have one piece."""

    outer: tuple[str, ...]
    pieces: tuple[tuple[str, ...], ...]
    inner: tuple[str, ...] = ()

    def axes(self, piece: int, *, star: bool = False) -> tuple[str, ...]:
        """Return the axes of one piece (the only one if the dim is not fused); with `star`, of several equal pieces."""
        over = (STAR,) if star and len(self.pieces) > 1 else ()
        return (*self.outer, *over, *self._of(piece), *self.inner)

    def length(self, sizes: Sizes) -> int:
        """Return the length of the full dim, with all its pieces."""
        return _count(self.outer, sizes) * sum(_count(one, sizes) for one in self.pieces) * _count(self.inner, sizes)

    def select(self, full: Tensor, dim: int, sizes: Sizes, piece: int, count: int) -> Tensor:
        """View `full` with this dim split into outer axes, `count` pieces from `piece` on, and inner axes."""
        lengths = [_count(one, sizes) for one in self.pieces]
        split = full.unflatten(dim, (_count(self.outer, sizes), sum(lengths), _count(self.inner, sizes)))
        return split.narrow(dim + 1, sum(lengths[:piece]), count * lengths[piece]) if len(lengths) > 1 else split

    def _of(self, piece: int) -> tuple[str, ...]:
        return self.pieces[piece if len(self.pieces) > 1 else 0]


@dataclass(frozen=True)
class Op:
    """A bijection between the axes of Hugging Face tensors and those of one native parameter.

    Attributes:
        sources: one pattern per tensor, or per piece of a tensor: dims separated by spaces, a dim of several axes in
            parentheses, slowest first, with the pieces of a fused dim in brackets. "1" stands for no axis.
        native: pattern of the native parameter, with `*` if several sources are stacked.
    """

    sources: tuple[str | FusedPiece, ...]
    native: str

    def __post_init__(self) -> None:
        native = self.native_axes
        assert native.count(STAR) == (len(self.sources) > 1), f"{self}: * stands for several sources"
        assert all(len(dim.pieces) == 1 for dim in _parse(self.native)), f"{self}: a native parameter has no pieces"
        wanted = sorted(axis for axis in native if axis != STAR)
        for source in range(len(self.sources)):
            fused = [len(dim.pieces) for dim in self._dims(source) if len(dim.pieces) > 1]
            assert len(fused) == self.is_piece(source), f"{self}: source {source} is no FusedPiece of one fused dim"
            assert not fused or self._piece(source) in range(fused[0]), f"{self}: source {source} is no piece"
            given = self._axes(source)
            assert sorted(given) == wanted, f"{self}: source {source} has axes {given}, native takes {wanted}"
            assert len(set(given)) == len(given), f"{self}: an axis stands twice in source {source}"

    @property
    def native_axes(self) -> list[str]:
        """Names of all axes of the native parameter, slowest first."""
        return [axis for dim in _parse(self.native) for axis in dim.axes(0)]

    def source_shape(self, source: int, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of a full Hugging Face tensor, with all its pieces."""
        return tuple(dim.length(sizes) for dim in self._dims(source))

    def is_piece(self, source: int) -> bool:
        """Test whether a source is a piece of a fused tensor, whose other pieces are in other parameters."""
        return isinstance(self.sources[source], FusedPiece)

    @property
    def is_run(self) -> bool:
        """The sources are consecutive pieces of one tensor with equal axes, so that one view covers them."""
        first = self.sources[0]
        return isinstance(first, FusedPiece) and all(
            source == FusedPiece(first.pattern, first.piece + index) and self._axes(index) == self._axes(0)
            for index, source in enumerate(self.sources)
        )

    def is_first_dim(self, axis: str) -> bool:
        """Test whether an axis is the first dim of every source, so that a range of it is a range of rows."""
        return all(self._dims(source)[0] == _Dim((), ((axis,),)) for source in range(len(self.sources)))

    def native_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of the full native parameter."""
        return tuple(dim.length({**sizes, STAR: len(self.sources)}) for dim in _parse(self.native))

    def split_dim(self, axis: str | None) -> int | None:
        """Return the native dim whose slowest axis is `axis`: the dim that tensor parallelism divides."""
        if axis is None:
            return None
        for index, dim in enumerate(_parse(self.native)):
            if dim.axes(0)[:1] == (axis,):
                return index
        raise AssertionError(f"axis {axis!r} leads no dim of {self.native!r}")

    def read(
        self,
        reader: Reader,
        sizes: Sizes,
        axis: str | None = None,
        start: int = 0,
        stop: int = 0,
        *,
        place: Tensor | None = None,
    ) -> Tensor:
        """Read the native parameter, or the shard [start, stop) of one axis; no element outside the shard is accessed.

        The result is a view if there is a single source and its layout allows it. Sources of different dtypes are
        stacked in a dtype that holds both.

        Args:
            place: bytes that stacked sources are copied to, if they suffice; None = new memory.
        """
        local = dict(sizes) if axis is None else {**sizes, axis: stop - start}

        def part(source: int, count: int = 1) -> Tensor:
            entries = self._in_native_order(source, reader(source), sizes, count)
            names = self.native_axes if count > 1 else self._order
            return entries if axis is None else entries.narrow(names.index(axis), start, stop - start)

        if len(self.sources) == 1:
            return part(0).reshape(self.native_shape(local))
        if self.is_run:
            with suppress(RuntimeError):  # its axes cannot be merged in place: stack the sources
                return part(0, len(self.sources)).view(self.native_shape(local))
        full = torch.empty(0)
        for source in range(len(self.sources)):  # one at a time: a view keeps the pages that it read in memory
            entries = part(source)
            if source == 0:
                full = self._stack_like(entries, place)
            elif entries.dtype != full.dtype:
                full = full.to(torch.promote_types(entries.dtype, full.dtype))
            full.select(self.native_axes.index(STAR), source).copy_(entries)
        return full.reshape(self.native_shape(local))

    def read_source(self, source: int, full: Tensor, native: Tensor, sizes: Sizes) -> None:
        """Copy one full Hugging Face tensor to its place in a full native parameter, which is contiguous."""
        self.slot(source, native, sizes).copy_(self._in_native_order(source, full, sizes))

    def write(self, source: int, native: Tensor, sizes: Sizes) -> Tensor:
        """Return one Hugging Face tensor of a full native parameter, as a view if possible; the inverse of `read`."""
        assert not self.is_piece(source), f"{self}: source {source} is not a full tensor"
        given = self._axes(source)
        entries = self.slot(source, native, sizes).permute([self._order.index(name) for name in given])
        return entries.reshape(self.source_shape(source, sizes))

    def write_piece(self, source: int, native: Tensor, sizes: Sizes, fused: Tensor) -> None:
        """Copy one piece of a full native parameter to its place in the full fused tensor."""
        assert self.is_piece(source), f"{self}: source {source} is a full tensor"
        self._in_native_order(source, fused, sizes).copy_(self.slot(source, native, sizes))

    @property
    def _order(self) -> list[str]:
        """Names of the axes of each source, in their order in the native parameter."""
        return [name for name in self.native_axes if name != STAR]

    def _in_native_order(self, source: int, full: Tensor, sizes: Sizes, count: int = 1) -> Tensor:
        """View a Hugging Face tensor, or `count` pieces of it, with one dim per axis, in native order."""
        view, dims, piece = full, self._dims(source), self._piece(source)
        for index in reversed(range(full.dim())):
            view = dims[index].select(view, index, sizes, piece, count)
        given = [name for dim in dims for name in dim.axes(piece, star=count > 1)]
        order = self.native_axes if count > 1 else self._order
        split = view.view([{**sizes, STAR: count}[name] for name in given])
        return split.permute([given.index(name) for name in order])

    def _stack_like(self, entries: Tensor, place: Tensor | None) -> Tensor:
        """Allocate memory for all sources, one dim per native axis, in a source's memory order: transposing is slow."""
        star = self.native_axes.index(STAR)
        slowest = sorted(range(entries.dim()), key=lambda dim: -entries.stride()[dim])
        order = [dim + (dim >= star) for dim in slowest]
        order.insert(order.index(star - 1) + 1 if star else 0, star)
        shape = [*entries.shape[:star], len(self.sources), *entries.shape[star:]]
        room = allocate(tuple(shape[dim] for dim in order), entries.dtype, place)
        return room.permute([order.index(dim) for dim in range(len(order))])

    def slot(self, source: int, native: Tensor, sizes: Sizes) -> Tensor:
        """View the part of a native parameter that one source holds, with one dim per axis."""
        view = native.reshape([{**sizes, STAR: len(self.sources)}[name] for name in self.native_axes])
        return view.select(self.native_axes.index(STAR), source) if STAR in self.native_axes else view

    def _dims(self, source: int) -> tuple[_Dim, ...]:
        given = self.sources[source]
        return _parse(given.pattern if isinstance(given, FusedPiece) else given)

    def _piece(self, source: int) -> int:
        given = self.sources[source]
        return given.piece if isinstance(given, FusedPiece) else 0

    def _axes(self, source: int) -> list[str]:
        return [axis for dim in self._dims(source) for axis in dim.axes(self._piece(source))]


def allocate(shape: tuple[int, ...], dtype: torch.dtype, place: Tensor | None) -> Tensor:
    """Return an uninitialized tensor, in the bytes of `place` if they suffice."""
    size_bytes = prod(shape) * dtype.itemsize
    if place is None or len(place) < size_bytes:
        return torch.empty(shape, dtype=dtype)
    return place[:size_bytes].view(dtype).view(shape)


def copy(pattern: str) -> Op:
    """Return the operation of a tensor that only changes its name."""
    return Op((pattern,), pattern)


def tile(uses: Sequence[str | FusedPiece]) -> bool:
    """Test whether the sources of one tensor cover it exactly once."""
    parts = [use for use in uses if isinstance(use, FusedPiece)]
    if len(parts) < len(uses):
        return len(uses) == 1
    pieces = {piece for part in parts for dim in _parse(part.pattern) for piece in range(len(dim.pieces))}
    return len({part.pattern for part in parts}) == 1 and sorted(part.piece for part in parts) == sorted(pieces)


@cache
def _parse(pattern: str) -> tuple[_Dim, ...]:
    """Parse a pattern: "(k [g|1|1] d) h" -> its two dims."""
    return tuple(_parse_dim(group.strip("()")) for group in re.findall(r"\([^)]*\)|\S+", pattern))


def _parse_dim(text: str) -> _Dim:
    def axes(names: str) -> tuple[str, ...]:
        return tuple(name for name in names.split() if name != "1")

    fused = re.fullmatch(r"([^\[]*)\[([^\]]*)\]([^\[]*)", text)
    if fused is None:
        return _Dim((), (axes(text),))
    outer, pieces, inner = fused.groups()
    return _Dim(axes(outer), tuple(axes(piece) for piece in pieces.split("|")), axes(inner))


def _count(axes: tuple[str, ...], sizes: Sizes) -> int:
    return prod(sizes[axis] for axis in axes)
