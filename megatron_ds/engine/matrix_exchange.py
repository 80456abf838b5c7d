"""Exchange of matrices between the ranks that hold parts of them and the one rank that works on each as a whole.

Tensor ranks divide matrices, ZeRO divides what they hold again, and other ranks may hold copies. Each matrix has one
owner among the ranks of its pipeline stage. Parts of all matrices are sent to the owners, an all-to-all; each owner
replaces its matrices by others of their shape; and the parts are sent back, a second all-to-all.

Owners are chosen so that all ranks have equal work, and, as far as that permits, so that an owner already holds most of
its matrix. Each element is sent to its owner once, by one of the ranks that hold it unless the owner does, and comes
back once to each of the others. Rounds bound the memory of the buffers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ds.layers.param_spec import ParamSpec, Range
from megatron_ds.layers.tensor_slices import slices_of_range
from megatron_ds.parallel.collectives import exchange_rows
from megatron_ds.parallel.grid import Axis

ROUND_ELEMENTS = 2**26
"""The number of elements that an owner works on in one round, unless one matrix has more."""


class Holding(NamedTuple):
    """A range of the flattened shard of a parameter that a rank holds.

    Attributes:
        parameter: index of the parameter.
        ranges: for each dim, the [start, stop) of the full parameter that the shard is.
        start, stop: the range of the flattened shard.
    """

    parameter: int
    ranges: tuple[Range, ...]
    start: int
    stop: int


class MatrixKey(NamedTuple):
    """A matrix, by the index of its parameter and its index in it."""

    parameter: int
    matrix: int


class Piece(NamedTuple):
    """The elements of one matrix that lie in one contiguous slice of a `Holding`.

    Attributes:
        matrix: index of the matrix in its parameter.
        begin: where the slice begins in the holding.
        shape: of the slice, in the view of `Matrices.view_ranges`.
        slot: index of the matrix in the slice.
        place: ranges of the matrix's blocks, rows in a block, and columns.
    """

    matrix: int
    begin: int
    shape: tuple[int, ...]
    slot: int
    place: tuple[Range, Range, Range]

    @property
    def numel(self) -> int:
        return prod(self.shape) // self.shape[1]

    def of(self, held: Tensor) -> Tensor:
        """View the elements in all that is held, (n,) -> (blocks, rows, columns)."""
        return held[self.begin : self.begin + prod(self.shape)].view(self.shape)[:, self.slot]

    def within(self, matrix: Tensor) -> Tensor:
        """View the elements in the full matrix, (blocks, rows, columns) -> the shape of `of`."""
        return matrix[tuple(slice(*along) for along in self.place)]


def pieces(spec: ParamSpec, holding: Holding) -> Iterator[Piece]:
    """Yield the pieces of a rank's range of a parameter, in the order of memory."""
    assert spec.matrices is not None, spec
    view = spec.matrices.view_ranges(holding.ranges, spec.shape)
    begin = 0
    for part in slices_of_range(tuple(stop - start for start, stop in view), holding.start, holding.stop):
        blocks, matrices, rows, columns = (
            (low + start, low + start + length) for (low, _), start, length in zip(view, part.start, part.shape)
        )
        for slot, matrix in enumerate(range(*matrices)):
            yield Piece(matrix, begin, part.shape, slot, (blocks, rows, columns))
        begin += part.numel


@dataclass(frozen=True)
class Transfer:
    """A piece that goes to its owner and back.

    Attributes:
        key: the matrix.
        holding: the holding that the piece lies in, the same on all its holders.
        piece: the piece.
        owner: the rank that works on the matrix.
        holders: the ranks that hold the piece; `sender` is the one that sends it to the owner.
    """

    key: MatrixKey
    holding: Holding
    piece: Piece
    owner: int
    holders: tuple[int, ...]

    @property
    def sender(self) -> int:
        """The owner if it holds the piece, else the holder that is nearest by its rank."""
        return min(self.holders, key=lambda rank: abs(rank - self.owner))


Part = tuple[int, Transfer]
"""Another rank, and what is sent to it or comes from it."""


class _Round:
    """One round of an exchange as one rank sees it.

    Attributes:
        owned: the matrices that this rank works on, each with its blocks, rows in a block, and columns.
        sent, gathered: what goes to owners, and comes to this rank as an owner; by the other rank.
        scattered, received: what goes back from this rank as an owner, and comes back from owners; by the other rank.
    """

    def __init__(self, transfers: Sequence[Transfer], rank: int, shapes: Mapping[MatrixKey, tuple[int, int, int]]):
        own = [one for one in transfers if one.owner == rank]
        held = [one for one in transfers if rank in one.holders]
        self.owned = {one.key: shapes[one.key] for one in own}
        self.sent = _by_rank((one.owner, one) for one in held if one.sender == rank)
        self.gathered = _by_rank((one.sender, one) for one in own)
        self.scattered = _by_rank((holder, one) for one in own for holder in one.holders)
        self.received = _by_rank((one.owner, one) for one in held)


def _by_rank(parts: Iterator[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: part[0])  # stable: both ends have the order of the transfers


class MatrixExchange:
    """The plan of the exchange of some parameters' matrices. Every rank of a pipeline stage has the same one.

    Args:
        specs: index of a parameter -> its declaration.
        holdings: of each rank of the stage, the ranges that it holds, at most one for each parameter.
        stage: the ranks of the pipeline stage.
        device: of the buffers.
        round_elements: see `ROUND_ELEMENTS`.

    Attributes:
        specs: the declarations.
        shapes: rows and columns of each matrix.
        owners: the rank that works on it.
        transfers: what is sent in each round.
    """

    def __init__(
        self,
        specs: Mapping[int, ParamSpec],
        holdings: Sequence[Sequence[Holding]],
        stage: Axis,
        device: torch.device,
        round_elements: int = ROUND_ELEMENTS,
    ) -> None:
        self.specs, self.stage, self.device = specs, stage, device
        holders: dict[MatrixKey, dict[tuple[Holding, Piece], list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, own in enumerate(holdings):
            for holding in own:
                for piece in pieces(specs[holding.parameter], holding):
                    holders[MatrixKey(holding.parameter, piece.matrix)][holding, piece].append(rank)
        shapes = {key: _blocks_rows_columns(specs[key.parameter]) for key in sorted(holders)}
        for key, shape in shapes.items():
            assert sum(piece.numel for _, piece in holders[key]) == prod(shape), (key, shape, "is not complete")
        self.shapes = {key: (blocks * rows, columns) for key, (blocks, rows, columns) in shapes.items()}
        self.owners = deal({key: _work(shape) for key, shape in shapes.items()}, holders, stage.size)
        self.transfers = [
            [
                Transfer(key, holding, piece, self.owners[key], tuple(ranks))
                for key in keys
                for (holding, piece), ranks in holders[key].items()
            ]
            for keys in _in_rounds(self.owners, shapes, round_elements)
        ]
        self._rounds = [_Round(transfers, stage.rank, shapes) for transfers in self.transfers]

    def run(
        self,
        read: Callable[[Transfer], Tensor],
        replace: Callable[[dict[MatrixKey, Tensor]], Mapping[MatrixKey, Tensor]],
        write: Callable[[Transfer, Tensor], None],
        dtype: torch.dtype,
    ) -> None:
        """Send the matrices to their owners, replace them, and return the pieces to all. Collective over the stage.

        Two all-to-alls a round. In total ranks send each element that its owner does not hold to the owner once, and
        owners send each element once to every other rank that holds it.

        Args:
            read: a piece that this rank holds -> its elements, (blocks, rows, columns).
            replace: matrices (rows, columns) that this rank owns -> their replacements.
            write: called with each piece that this rank holds, and its elements of the replacement.
            dtype: the matrices' dtype, to which they are rounded before they are sent.
        """
        for one in self._rounds:
            arrived = self._exchange(one.sent, one.gathered, read, dtype)
            matrices = {key: torch.empty(shape, dtype=dtype, device=self.device) for key, shape in one.owned.items()}
            for transfer, elements in arrived:
                transfer.piece.within(matrices[transfer.key]).copy_(elements)
            replaced = replace({key: matrix.flatten(0, 1) for key, matrix in matrices.items()})
            whole = {key: replaced[key].view(shape) for key, shape in one.owned.items()}
            for transfer, elements in self._exchange(one.scattered, one.received, partial(_cut, whole), dtype):
                write(transfer, elements)

    def _exchange(
        self, out: list[Part], into: list[Part], read: Callable[[Transfer], Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[Transfer, Tensor]]:
        """Send pieces, and yield those that come, each with its elements, (blocks, rows, columns)."""
        sent, received = self._counts(out), self._counts(into)
        buffer, begin = torch.empty(sum(sent), dtype=dtype, device=self.device), 0
        for _, transfer in out:
            elements = read(transfer)
            buffer[begin : begin + elements.numel()].view(elements.shape).copy_(elements)
            begin += elements.numel()
        arrived, begin = exchange_rows(buffer, self.stage, sent, received), 0
        for _, transfer in into:
            blocks, _, rows, columns = transfer.piece.shape
            yield transfer, arrived[begin : begin + transfer.piece.numel].view(blocks, rows, columns)
            begin += transfer.piece.numel

    def _counts(self, parts: list[Part]) -> list[int]:
        counts = [0] * self.stage.size
        for rank, transfer in parts:
            counts[rank] += transfer.piece.numel
        return counts


def _cut(matrices: Mapping[MatrixKey, Tensor], transfer: Transfer) -> Tensor:
    return transfer.piece.within(matrices[transfer.key])


def deal(
    work: Mapping[MatrixKey, int], holders: Mapping[MatrixKey, Mapping[tuple[Holding, Piece], list[int]]], size: int
) -> dict[MatrixKey, int]:
    """Choose the owner of each matrix: the rank that holds most of it, among those that have not their share of work.

    Args:
        work: the work on each matrix.
        holders: the pieces of each matrix, with the ranks that hold them.
        size: number of ranks.
    """
    share = max(sum(work.values()) / size, max(work.values(), default=0))
    loads, owners = [0] * size, dict[MatrixKey, int]()
    for key in sorted(work, key=lambda key: -work[key]):
        held: dict[int, int] = defaultdict(int)
        for (_, piece), ranks in holders[key].items():
            for rank in ranks:
                held[rank] += piece.numel
        fitting = [rank for rank in held if loads[rank] + work[key] <= share]
        owner = max(fitting, key=lambda rank: (held[rank], -loads[rank]), default=loads.index(min(loads)))
        loads[owner] += work[key]
        owners[key] = owner
    return {key: owners[key] for key in work}


def _in_rounds(
    owners: Mapping[MatrixKey, int], shapes: Mapping[MatrixKey, tuple[int, int, int]], most: int
) -> list[list[MatrixKey]]:
    """Return the matrices of each round: of every owner at most `most` elements, but at least one matrix."""
    place: dict[int, tuple[int, int]] = {}  # of each owner: its current round, and the elements in it
    rounds: dict[int, list[MatrixKey]] = defaultdict(list)
    for key, owner in owners.items():
        number, filled = place.get(owner, (0, 0))
        size = prod(shapes[key])
        if filled and filled + size > most:
            number, filled = number + 1, 0
        rounds[number].append(key)
        place[owner] = number, filled + size
    return [rounds[number] for number in sorted(rounds)]


def _blocks_rows_columns(spec: ParamSpec) -> tuple[int, int, int]:
    assert spec.matrices is not None, spec
    (_, blocks), _, (_, rows), (_, columns) = spec.matrices.view_ranges(spec.full_ranges, spec.shape)
    return blocks, rows, columns


def _work(shape: tuple[int, int, int]) -> int:
    """Return a number in proportion to the multiplications of a product of a matrix with its transpose."""
    blocks, rows, columns = shape
    return blocks * rows * columns * min(blocks * rows, columns)
