"""Rows of S tokens that are cut from documents: long ones by themselves, short ones packed.

Each document of more than S tokens is cut into rows of its own, from its beginning on, so that such a row holds one
document. What is left over, and all shorter documents, are concatenated in the order of the data and cut into rows too.
A row is read with the token that follows it, the last target: S + 1 tokens. Every token but the first of the packed
ones, and of each document with rows of its own, is a target once; the first token of what is left over of a document is
one in the row before it, and is not predicted from another document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_ds.data.long_context.bands import LengthBand


class Piece(NamedTuple):
    """Tokens [offset, offset + length) of a document."""

    document: int
    offset: int
    length: int


@dataclass(frozen=True)
class Rows:
    """The rows of the documents of a band; each array is a file of the cache.

    Attributes:
        long: (l,) numbers of the documents of more than S tokens.
        long_ends: (l,) number of rows of one document up to the end of each.
        packed: (m,) numbers of the documents of which a piece is packed.
        packed_offsets: (m,) beginning of that piece, which reaches to the end of its document.
        packed_ends: (m,) number of packed tokens up to the end of each.
        counts: (2,) number of documents of the band, and of their tokens.
    """

    long: np.ndarray
    long_ends: np.ndarray
    packed: np.ndarray
    packed_offsets: np.ndarray
    packed_ends: np.ndarray
    counts: np.ndarray

    @property
    def num_whole(self) -> int:
        """Number of rows of one document; they come first."""
        return int(self.long_ends[-1]) if len(self.long_ends) else 0

    def count(self, seq_length: int) -> int:
        """Return the number of rows; tokens at the end that do not fill one are left out."""
        packed = int(self.packed_ends[-1]) if len(self.packed_ends) else 0
        return self.num_whole + max(0, packed - 1) // seq_length

    def pieces(self, row: int, seq_length: int) -> Iterator[Piece]:
        """Yield the pieces of documents that make up a row, of S + 1 tokens in all."""
        if row < self.num_whole:
            number = int(np.searchsorted(self.long_ends, row, side="right"))
            before = int(self.long_ends[number - 1]) if number else 0
            yield Piece(int(self.long[number]), (row - before) * seq_length, seq_length + 1)
            return
        start = (row - self.num_whole) * seq_length
        stop = start + seq_length + 1
        number = int(np.searchsorted(self.packed_ends, start, side="right"))
        while start < stop:
            before = int(self.packed_ends[number - 1]) if number else 0
            length = min(int(self.packed_ends[number]), stop) - start
            yield Piece(int(self.packed[number]), int(self.packed_offsets[number]) + start - before, length)
            start, number = start + length, number + 1


def in_band(lengths: np.ndarray, band: LengthBand) -> np.ndarray:
    """Return which documents are in a band: (N,) bool."""
    chosen = lengths >= band.least
    return chosen if band.below is None else chosen & (lengths < band.below)


def cut_rows(lengths: np.ndarray, band: LengthBand, seq_length: int) -> Rows:
    """Cut the documents of a band into rows.

    Args:
        lengths: (N,) tokens of each document.
        band: the documents that are cut.
        seq_length: S.
    """
    documents = np.flatnonzero(in_band(lengths, band))
    sizes = lengths[documents].astype(np.int64)
    whole = np.maximum(sizes - 1, 0) // seq_length
    is_long = whole > 0
    rests = sizes - whole * seq_length
    is_packed = rests > is_long  # a rest of one token is the last target of a row already
    return Rows(
        long=documents[is_long],
        long_ends=np.cumsum(whole[is_long]),
        packed=documents[is_packed],
        packed_offsets=(whole * seq_length)[is_packed],
        packed_ends=np.cumsum(rests[is_packed]),
        counts=np.asarray([len(documents), sizes.sum()], dtype=np.int64),
    )
