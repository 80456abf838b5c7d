"""Corpora of `data.format: text`: the stream of all documents' tokens, each document between special tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ds.data.readers.bad_rows import BadRows
from megatron_ds.data.readers.concat_index import ConcatIndex
from megatron_ds.data.readers.document_frame import DocumentFrame
from megatron_ds.errors import DataError

_SCAN_TOKENS = 1 << 22


class TokenStream:
    """Several token arrays, read as one. Nothing is copied before it is read.

    Args:
        parts: 1-d arrays of any unsigned type, memory-mapped ones included.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._index = ConcatIndex([len(part) for part in self._parts])

    def __len__(self) -> int:
        return len(self._index)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as (stop - start,) int64."""
        assert 0 <= start <= stop <= len(self), f"[{start}, {stop}) of {len(self)} tokens"
        tokens = np.empty(stop - start, dtype=np.int64)
        filled = 0
        while filled < len(tokens):
            part, offset = self._index.locate(start + filled)
            piece = self._parts[part][offset : offset + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
        return tokens

    def positions_of(self, token: int) -> np.ndarray:
        """Return all positions of `token`: int64, ascending. Reads the stream once, block by block."""
        found = [
            start + np.flatnonzero(self.read(start, min(start + _SCAN_TOKENS, len(self))) == token)
            for start in range(0, len(self), _SCAN_TOKENS)
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *found])


@dataclass(frozen=True)
class Corpus:
    """The tokens of all sources of a dataset.

    Attributes:
        tokens: all of them.
        digest: hash of their content; part of a dataset's fingerprint.
        name: the sources, for errors.
        frame: special tokens around each document.
        bad_rows: account of the rows that were left out.
    """

    tokens: TokenStream
    digest: str
    name: str
    frame: DocumentFrame = field(default_factory=DocumentFrame)
    bad_rows: BadRows = field(default_factory=BadRows)

    def fingerprint(self, *settings: object) -> str:
        """Return the SHA-256 of the content and of all settings that decide the samples."""
        lines = ["text", self.digest, *map(str, settings)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def require_sample(self, num_tokens: int, seq_length: int, largest_length: int) -> None:
        """Refuse a corpus that does not fill one sample.

        Args:
            num_tokens: tokens of one sample.
            seq_length: S of the run.
            largest_length: the largest S that the corpus can fill; below 1 = it fills no sample.

        Raises:
            DataError: fewer than `num_tokens` tokens.
        """
        if len(self.tokens) < num_tokens:
            fix = f"lower data.seq_length to at most {largest_length} or add text" if largest_length > 0 else "add text"
            raise DataError(
                f"data: {self.name}: {len(self.tokens)} tokens do not fill one sample of data.seq_length={seq_length}, "
                f"which takes {num_tokens}; {fix}"
            )
