"""The documents of a run's sources, addressed by number: what a data format offers to a mix of lengths."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from megatron_ds.data.readers.bad_rows import BadRows, total_bad_rows
from megatron_ds.data.readers.concat_index import ConcatIndex


class Documents(Protocol):
    """N documents of tokens, read in parts."""

    @property
    def name(self) -> str:
        """The sources, for errors."""

    @property
    def digest(self) -> str:
        """Hash of the content: equal on every machine, changed by any change of a document."""

    @property
    def lengths(self) -> np.ndarray:
        """(N,) integers: tokens of each document, special ones included."""

    @property
    def begin_ids(self) -> Sequence[int]:
        """Special ids before each document."""

    @property
    def ends(self) -> Mapping[int, str]:
        """Special ids after each document, with their texts."""

    @property
    def bad_rows(self) -> BadRows:
        """Account of the rows that were left out."""

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Return tokens [offset, offset + length) of a document: (length,) int64.

        Raises:
            DataError: they hold an id that the model does not have, or one that is no text.
        """


class ConcatDocuments:
    """The documents of several sources, one source after the other.

    Args:
        parts: at least one.
    """

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = list(parts)
        self._index = ConcatIndex([len(part.lengths) for part in self._parts])
        self.name = ", ".join(part.name for part in parts)
        content = ["documents", *(part.digest for part in parts)]
        self.digest = hashlib.sha256("\n".join(content).encode()).hexdigest()
        self.begin_ids, self.ends = parts[0].begin_ids, parts[0].ends
        self.bad_rows = total_bad_rows(self._parts)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) integers: tokens of each document."""
        return np.concatenate([part.lengths for part in self._parts])

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Return tokens [offset, offset + length) of a document: (length,) int64."""
        part, number = self._index.locate(document)
        return self._parts[part].read(number, offset, length)
