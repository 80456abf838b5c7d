"""The documents of one tokenized source, each read in parts of any length."""

import numpy as np

from megatron_ds.data.readers.document_frame import DocumentFrame
from megatron_ds.data.text.token_cache import CachedTokens


class TextDocuments:
    """The documents of one source, with the special tokens around each.

    Args:
        name: of the source.
        cached: its tokens, with the length of each document.
        frame: the special tokens.
    """

    def __init__(self, name: str, cached: CachedTokens, frame: DocumentFrame) -> None:
        assert cached.lengths is not None, name
        self.name, self.digest, self.bad_rows = name, cached.key, cached.bad_rows
        self.begin_ids, self.ends = frame.begin_ids, frame.ends
        self.lengths: np.ndarray = cached.lengths
        self._tokens = cached.tokens
        self._starts = np.cumsum(cached.lengths) - cached.lengths

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Return tokens [offset, offset + length) of a document: (length,) int64."""
        start = int(self._starts[document]) + offset
        return self._tokens[start : start + length].astype(np.int64)
