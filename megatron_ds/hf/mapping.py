"""The invertible operation between Hugging Face tensors and one native parameter.

An operation is written down once, as patterns of named axes, and carried out both ways:

    Op(("(k d) h", "(k d) h"), native="(k * d) h")

Each source is viewed with its axes split as written and permuted into the native order, the sources are concatenated
along `*` (a new axis, of one entry a source), and the axes are merged as `native` says. A fused tensor holds several
pieces, of which a native parameter takes some; brackets say how they lie:

    QKV = "(k [g|1|1] d) h"                                     for each key head: its queries, the key, the value
    Op((Part(QKV, 0),), native="(k g d) h")                     the queries
    Op((Part(QKV, 1), Part(QKV, 2)), native="(k * d) h")        keys beside values

Nothing else is possible, so every operation is a bijection of elements and its inverse needs no code of its own.

A tensor-parallel share is a range of one named axis. It is cut while reading, so a rank reads only its part of a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from math import prod

import torch
from torch import Tensor

Reader = Callable[[int, tuple[slice, ...]], Tensor]
"""(index of a source, one slice a dim) -> that part of the tensor."""

Sizes = Mapping[str, int]
"""Axis -> how many entries it has."""

STAR = "*"


@dataclass(frozen=True)
class Part:
    """One piece of a fused tensor: the pattern of the whole, and which of the bracket's alternatives."""

    pattern: str
    piece: int


@dataclass(frozen=True)
class _Dim:
    """One dim of a pattern: outer axes, pieces one after the other, inner axes, slowest first. Most have one piece."""

    outer: tuple[str, ...]
    pieces: tuple[tuple[str, ...], ...]
    inner: tuple[str, ...] = ()

    def axes(self, piece: int) -> tuple[str, ...]:
        """The axes of one piece (of the only one, where the dim is not fused)."""
        return (*self.outer, *self._of(piece), *self.inner)

    def length(self, sizes: Sizes, piece: int | None = None) -> int:
        """Length of the whole dim, or of one piece of it."""
        chosen = self.pieces if piece is None else (self._of(piece),)
        return _count(self.outer, sizes) * sum(_count(one, sizes) for one in chosen) * _count(self.inner, sizes)

    def select(self, whole: Tensor, dim: int, sizes: Sizes, piece: int) -> Tensor:
        """View `whole`, this dim of it split into outer axes, pieces and inner axes, without the other pieces."""
        lengths = [_count(one, sizes) for one in self.pieces]
        split = whole.unflatten(dim, (_count(self.outer, sizes), sum(lengths), _count(self.inner, sizes)))
        return split.narrow(dim + 1, sum(lengths[:piece]), lengths[piece]) if len(lengths) > 1 else split

    def _of(self, piece: int) -> tuple[str, ...]:
        return self.pieces[piece if len(self.pieces) > 1 else 0]


@dataclass(frozen=True)
class Op:
    """How native axes are made of the axes of Hugging Face tensors.

    Attributes:
        sources: one a tensor, or a piece of one: dims separated by spaces, a dim of several axes in parentheses,
            slowest first, with the pieces of a fused dim in brackets. "1" is no axis.
        native: pattern of the native parameter, with `*` where several sources are stacked.
    """

    sources: tuple[str | Part, ...]
    native: str

    def __post_init__(self) -> None:
        native = self.native_axes
        assert native.count(STAR) == (len(self.sources) > 1), f"{self}: * stands for several sources"
        wanted = sorted(axis for axis in native if axis != STAR)
        for source in range(len(self.sources)):
            given = self._axes(source)
            assert sorted(given) == wanted, f"{self}: source {source} has axes {given}, native takes {wanted}"
            assert len(set(given)) == len(given), f"{self}: an axis stands twice in source {source}"

    @property
    def native_axes(self) -> list[str]:
        """All axes of the native parameter, slowest first."""
        return [axis for dim in _parse(self.native) for axis in dim.axes(0)]

    def source_shape(self, source: int, sizes: Sizes) -> tuple[int, ...]:
        """Shape of a whole Hugging Face tensor, all pieces of it."""
        return tuple(dim.length(sizes) for dim in self._dims(source))

    def is_piece(self, source: int) -> bool:
        """Whether a source is a piece of a fused tensor, of which other parameters hold the rest."""
        return isinstance(self.sources[source], Part)

    def native_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Shape of the whole native parameter."""
        return tuple(dim.length({**sizes, STAR: len(self.sources)}) for dim in _parse(self.native))

    def split_dim(self, axis: str | None) -> int | None:
        """The native dim whose slowest axis is `axis`: the dim that tensor parallelism divides."""
        if axis is None:
            return None
        for index, dim in enumerate(_parse(self.native)):
            if dim.axes(0)[0] == axis:
                return index
        raise AssertionError(f"axis {axis!r} leads no dim of {self.native!r}")

    def read(self, reader: Reader, sizes: Sizes, axis: str | None, start: int, stop: int) -> Tensor:
        """Make the native parameter, or the share [start, stop) of one axis, from parts of the sources.

        Reads no element twice and none outside the share. The result may share memory with what `reader` gave.
        """
        local = dict(sizes) if axis is None else {**sizes, axis: stop - start}
        order = [name for name in self.native_axes if name != STAR]
        parts = []
        for source in range(len(self.sources)):
            runs = [_runs(dim, sizes, self._piece(source), axis, start, stop) for dim in self._dims(source)]
            given = self._axes(source)
            view = _read_runs(partial(reader, source), runs).reshape([local[name] for name in given])
            parts.append(view.permute([given.index(name) for name in order]))
        whole = torch.stack(parts, dim=self.native_axes.index(STAR)) if len(parts) > 1 else parts[0]
        return whole.reshape(self.native_shape(local))

    def write(self, native: Tensor, sizes: Sizes) -> Iterator[Tensor]:
        """The inverse, for a whole native parameter: a tensor (or piece) a source, each made when it is asked for.

        They may be views of `native`, and need not be contiguous.
        """
        parts = [native]
        if STAR in self.native_axes:
            view = native.reshape([{**sizes, STAR: len(self.sources)}[axis] for axis in self.native_axes])
            parts = list(view.unbind(self.native_axes.index(STAR)))
        order = [name for name in self.native_axes if name != STAR]
        for source, part in enumerate(parts):
            part = part.reshape([sizes[name] for name in order])
            part = part.permute([order.index(name) for name in self._axes(source)])
            yield part.reshape([dim.length(sizes, self._piece(source)) for dim in self._dims(source)])

    def place(self, source: int, piece: Tensor, whole: Tensor, sizes: Sizes) -> None:
        """Copy what `write` gave for a piece into its place in the whole fused tensor, which is contiguous."""
        view = whole
        for index in reversed(range(whole.dim())):
            view = self._dims(source)[index].select(view, index, sizes, self._piece(source))
        view.copy_(piece.reshape(view.shape))

    def _dims(self, source: int) -> tuple[_Dim, ...]:
        given = self.sources[source]
        return _parse(given.pattern if isinstance(given, Part) else given)

    def _piece(self, source: int) -> int:
        given = self.sources[source]
        return given.piece if isinstance(given, Part) else 0

    def _axes(self, source: int) -> list[str]:
        return [axis for dim in self._dims(source) for axis in dim.axes(self._piece(source))]


def copy(pattern: str) -> Op:
    """The same tensor under another name."""
    return Op((pattern,), pattern)


@cache
def _parse(pattern: str) -> tuple[_Dim, ...]:
    """ "(k [g|1|1] d) h" -> its two dims."""
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


def _runs(dim: _Dim, sizes: Sizes, piece: int, axis: str | None, start: int, stop: int) -> list[slice]:
    """The ranges of a dim that a piece, or the part [start, stop) of one of its axes, consists of, in order."""
    axes = dim.axes(piece)
    if len(dim.pieces) == 1 and (axis not in axes or (start, stop) == (0, sizes[axis])):
        return [slice(0, dim.length(sizes))]
    indices = dim.select(torch.arange(dim.length(sizes)), 0, sizes, piece).reshape([sizes[name] for name in axes])
    if axis in axes:
        indices = indices.narrow(axes.index(axis), start, stop - start)
    flat = indices.flatten()
    if flat.numel() == 0:
        return [slice(0, 0)]
    breaks = (flat.diff() != 1).nonzero().flatten().tolist()
    begins, ends = [0, *(index + 1 for index in breaks)], [*breaks, flat.numel() - 1]
    return [slice(int(flat[begin]), int(flat[end]) + 1) for begin, end in zip(begins, ends)]


def _read_runs(read: Callable[[tuple[slice, ...]], Tensor], runs: list[list[slice]]) -> Tensor:
    """Read the product of each dim's ranges, and put them together."""
    for dim, ranges in enumerate(runs):
        if len(ranges) > 1:
            parts = [_read_runs(read, [*runs[:dim], [one], *runs[dim + 1 :]]) for one in ranges]
            return torch.cat(parts, dim=dim)
    return read(tuple(ranges[0] for ranges in runs))
