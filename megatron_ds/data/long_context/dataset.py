"""Causal samples that are rows of the documents of one band of lengths."""

import hashlib
from dataclasses import fields
from pathlib import Path

import numpy as np

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.data.dataset import Sample, blank_sample, format_count
from megatron_ds.data.long_context.bands import LengthBand
from megatron_ds.data.long_context.documents import Documents
from megatron_ds.data.long_context.rows import Rows, cut_rows, in_band
from megatron_ds.data.readers.array_cache import cached_arrays
from megatron_ds.errors import DataError

FORMAT_VERSION = 1


class BandDataset:
    """Samples of S tokens from the documents of a band; see `rows`.

    Args:
        documents: of all lengths.
        band: those that are read.
        seq_length: S.
        packing: whether documents in a sample do not attend to one another; samples then have `position_ids`.
        cache_dir: directory in which the rows are kept.

    Raises:
        DataError: no document is in the band, they do not fill a sample, or the cache cannot be written.
    """

    target_length = None
    ordered = False

    def __init__(self, documents: Documents, band: LengthBand, seq_length: int, packing: bool, cache_dir: Path) -> None:
        self.seq_length, self._documents, self._band, self._packing = seq_length, documents, band, packing
        self.columns = ("input_ids", "targets", *(("position_ids",) if packing else ()))
        self.begin_ids, self.ends, self.bad_rows = documents.begin_ids, documents.ends, documents.bad_rows
        decides = (FORMAT_VERSION, documents.digest, band.least, band.below, seq_length)
        key = hashlib.sha256(repr(decides).encode()).hexdigest()
        kinds = {field.name: "i8 1" for field in fields(Rows)}
        self._rows = Rows(**cached_arrays(cache_dir, f"{key}.rows", kinds, self._cut))
        self._count = self._rows.count(seq_length)
        self._require_sample()
        content = ["long_context", documents.digest, f"{band.least}:{band.below}", str(seq_length), str(packing)]
        self.fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    @property
    def num_documents(self) -> int:
        """Number of documents of the band."""
        return int(self._rows.counts[0])

    @property
    def num_tokens(self) -> int:
        """Number of tokens in them."""
        return int(self._rows.counts[1])

    @property
    def num_whole(self) -> int:
        """Number of samples that hold one document alone."""
        return self._rows.num_whole

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) integers: tokens of each document of the band."""
        lengths = self._documents.lengths
        return lengths[in_band(lengths, self._band)]

    def sample(self, index: int) -> Sample:
        """Return row `index % len`: (S,) inputs, and the same shifted by one as targets; the same in every epoch.

        Raises:
            DataError: the sample holds an id that the model does not have, or one that is no text.
        """
        pieces = list(self._rows.pieces(index % len(self), self.seq_length))
        tokens = np.concatenate([self._documents.read(*piece) for piece in pieces])
        targets = tokens[1:].copy()
        starts = np.cumsum([piece.length for piece in pieces])[:-1]
        for start, piece in zip(starts.tolist(), pieces[1:]):
            if self._packing or piece.offset:  # the middle of a document does not follow from another one
                targets[start - 1] = IGNORE_INDEX
        sample = {"input_ids": tokens[:-1], "targets": targets}
        if self._packing:
            sample["position_ids"] = np.concatenate([np.arange(piece.length) for piece in pieces])[:-1]
        return sample

    def blank(self) -> Sample:
        """Return a sample without loss; see `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, None)

    def describe(self) -> str:
        """Return a line such as `1.2 M tokens in 34 documents, 290 samples of 4096, 266 of them of one document`."""
        return (
            f"{format_count(self.num_tokens)} tokens in {self.num_documents:,} documents, {len(self):,} samples of "
            f"{self.seq_length}, {self.num_whole:,} of them of one document{self.bad_rows.note}"
        )

    def _cut(self) -> dict[str, np.ndarray]:
        return vars(cut_rows(self._documents.lengths, self._band, self.seq_length))

    def _require_sample(self) -> None:
        if len(self):
            return
        longest, name = int(self._documents.lengths.max(initial=0)), self._documents.name
        if not self.num_documents:
            fix = f"nearest: {longest}" if self._band.least > longest else f"try without the key {self._band.least}"
            raise DataError(
                f"data.long_context={{{self._band.least}: ...}}: {name} has no {self._band}; the longest has "
                f"{longest:,} tokens; {fix}"
            )
        raise DataError(
            f"data: {name}: {self.num_tokens} tokens in {self.num_documents} {self._band} do not fill a sample of "
            f"data.seq_length={self.seq_length}, which takes {self.seq_length + 1}; lower it or add text"
        )
