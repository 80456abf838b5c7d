"""The documents of a pair of indexed files, each read in parts of any length."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_ds.data.indexed.dataset import split_bounds
from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.readers.bad_rows import BadRows
from megatron_ds.data.readers.placeholders import NO_PLACEHOLDERS, Placeholders
from megatron_ds.data.request import Split
from megatron_ds.errors import DataError


class IndexedDocuments:
    """The documents of a part of a file.

    Args:
        file: an indexed file.
        vocab_size: ids must be below it; each is checked when it is read.
        split: part of the sequences; None = all. A document that lies in two parts is cut.
        placeholders: ids that no document may hold; they are compared when it is read, as the ids are.

    Raises:
        DataError: the part is empty.
    """

    def __init__(
        self,
        file: IndexedFile,
        vocab_size: int,
        split: Split | None = None,
        placeholders: Placeholders = NO_PLACEHOLDERS,
    ) -> None:
        self._file, self._vocab_size, self._placeholders = file, vocab_size, placeholders
        self.name, self.bad_rows = file.prefix, BadRows()
        self.begin_ids: Sequence[int] = ()
        self.ends: Mapping[int, str] = {}
        self._start, self._stop = split_bounds(len(file), split)
        self._edges: np.ndarray | None = None  # first sequence of each document; None = each has one
        if (np.diff(file.document_indices) != 1).any():
            self._edges = np.unique(np.clip(file.document_indices, self._start, self._stop))
        content = f"indexed\n{file.digest()}\n{self._start}:{self._stop}"
        self.digest = hashlib.sha256(content.encode()).hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """(N,) integers: tokens of each document."""
        lengths = self._file.lengths[self._start : self._stop]
        if self._edges is None:
            return lengths
        return np.add.reduceat(lengths, self._edges[:-1] - self._start, dtype=np.int64)

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Return tokens [offset, offset + length) of a document: (length,) int64.

        Raises:
            DataError: they hold an id that the model does not have, or one that is no text.
        """
        sequence = self._start + document if self._edges is None else int(self._edges[document])
        start = int(self._file.pointers[sequence]) // self._file.dtype.itemsize + offset
        tokens = self._file.read_tokens(start, start + length).astype(np.int64)
        where = f"{self._file.prefix}: the document that begins at sequence {sequence}"
        wrong = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
        if len(wrong):
            raise DataError(
                f"data: {where} holds the id {wrong[0]}, but the model's vocab_size={self._vocab_size} ends at "
                f"{self._vocab_size - 1}; prepare the data with the model's own tokenizer"
            )
        self._placeholders.require_none(tokens, where)
        return tokens
