"""Sums over the rows, columns and elements of a parameter's matrices, whose parts lie on many ranks.

Tensor ranks divide matrices, ZeRO divides what they hold again, and other ranks hold copies. Every rank adds up what it
holds, each element on one rank alone, and one all-reduce over the pipeline stage gives the sums to all. They are added
in fp64: the fp32 results are then the same however the elements are divided, in all but one of many millions, so that
stages with copies of a tied parameter update them alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ds.engine.matrix_exchange import Holding, Piece, pieces
from megatron_ds.layers.param_spec import Matrices, ParamSpec
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import Axis


class Shape(NamedTuple):
    """A full parameter as matrices; the rows of one are the first and the third dim. See `Matrices.view_ranges`."""

    blocks: int
    matrices: int
    rows: int
    columns: int

    @property
    def each(self) -> int:
        """The number of elements of one matrix."""
        return self.blocks * self.rows * self.columns


def as_matrices(spec: ParamSpec, *, is_vector: bool) -> ParamSpec:
    """Return a declaration of the same elements as matrices; vectors, along the last dim, have one column."""
    ones = (1,) * max(1, 2 - len(spec.shape)) if is_vector else ()
    return replace(spec, shape=(*spec.shape, *ones), matrices=spec.matrices or Matrices())


@dataclass(frozen=True)
class SummedPart:
    """Elements of one matrix that this rank holds.

    Attributes:
        parameter: index of the parameter.
        piece: where they lie in what the rank holds of the parameter, and in the matrix.
        is_counted: this rank adds them to the sums; others may hold copies.
    """

    parameter: int
    piece: Piece
    is_counted: bool


class TensorSums:
    """The sums of the parameters that one call of `step` updates. Every rank of a pipeline stage has the same ones.

    Args:
        specs: index of a parameter -> its declaration, from `as_matrices`.
        holdings: of each rank of the stage, the ranges that it holds, at most one for each parameter.
        stage: the ranks of the pipeline stage.
        device: of the communication.

    Attributes:
        shapes: index of a parameter -> its shape.
        parts: those of this rank, in the order of memory.
    """

    def __init__(
        self,
        specs: Mapping[int, ParamSpec],
        holdings: Sequence[Sequence[Holding]],
        stage: Axis,
        device: torch.device,
    ) -> None:
        self._stage, self._device = stage, device
        first: dict[tuple[Holding, Piece], int] = {}
        found: dict[int, int] = defaultdict(int)
        for rank, own in enumerate(holdings):
            for holding in own:
                for piece in pieces(specs[holding.parameter], holding):
                    if first.setdefault((holding, piece), rank) == rank:
                        found[holding.parameter] += piece.numel
        self.shapes = {number: _shape(specs[number]) for number in sorted(found)}
        for number, shape in self.shapes.items():
            assert found[number] == prod(shape), (number, shape, found[number], "is not complete")
        self.parts = [
            SummedPart(holding.parameter, piece, first[holding, piece] == stage.rank)
            for holding in holdings[stage.rank]
            for piece in pieces(specs[holding.parameter], holding)
        ]

    def zeros(self, device: torch.device, *, of_rows: bool) -> Sums:
        """Return sums to add to: of each matrix, and of its rows and columns if `of_rows`."""
        lengths = [
            (shape.matrices, shape.blocks * shape.matrices * shape.rows, shape.matrices * shape.columns)
            if of_rows
            else (shape.matrices,)
            for shape in self.shapes.values()
        ]
        buffer = torch.zeros(sum(map(sum, lengths)), dtype=torch.float64, device=device)
        parts: Iterator[Any] = iter(buffer.split([length for one in lengths for length in one]))
        each, rows, columns = {}, {}, {}
        for number, shape in self.shapes.items():
            each[number] = next(parts)
            if of_rows:
                rows[number] = next(parts).view(shape[:3])
                columns[number] = next(parts).view(shape.matrices, shape.columns)
        return Sums(buffer, each, rows, columns)

    def reduce(self, sums: Sums) -> None:
        """Add the sums of all ranks, in place. Collective over the pipeline stage."""
        if self._stage.size > 1:
            sums.buffer.copy_(all_reduce_(sums.buffer.to(self._device), self._stage))


class Sums(NamedTuple):
    """Sums in fp64, which one buffer holds.

    Attributes:
        buffer: (n,), all of them.
        each: index of a parameter -> of each of its matrices, (matrices,).
        rows: of their rows, (blocks, matrices, rows).
        columns: of their columns, (matrices, columns).
    """

    buffer: Tensor
    each: Mapping[int, Tensor]
    rows: Mapping[int, Tensor]
    columns: Mapping[int, Tensor]

    def add(self, part: SummedPart, values: Tensor) -> None:
        """Add elements, (blocks, rows, columns), to the sum of their matrix."""
        self.each[part.parameter][part.piece.matrix] += values.sum(dtype=torch.float64)

    def add_along(self, part: SummedPart, values: Tensor) -> None:
        """Add elements, (blocks, rows, columns), to the sums of their rows and columns."""
        blocks, rows, columns = (slice(*along) for along in part.piece.place)
        self.rows[part.parameter][blocks, part.piece.matrix, rows] += values.sum(-1, dtype=torch.float64)
        self.columns[part.parameter][part.piece.matrix, columns] += values.sum((0, 1), dtype=torch.float64)


def _shape(spec: ParamSpec) -> Shape:
    assert spec.matrices is not None, spec
    return Shape(*(stop - start for start, stop in spec.matrices.view_ranges(spec.full_ranges, spec.shape)))
