"""Causal samples from a pair of indexed files: S tokens as inputs, and the same shifted by one as targets."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from megatron_ds.data.blend import SourceUsage
from megatron_ds.data.dataset import Sample, blank_sample, format_count
from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.indexed.order import Epochs, Indices, build_indices, count_epochs
from megatron_ds.data.readers.array_cache import cached_arrays
from megatron_ds.data.readers.placeholders import NO_PLACEHOLDERS, Placeholders
from megatron_ds.data.request import Order, Split
from megatron_ds.errors import DataError

FORMAT_VERSION = 1
_ARRAYS = {"documents": "i4 1", "bounds": "i4 2, i8 2", "shuffle": "u4 1, i8 1"}


class IndexedDataset:
    """The documents of a file in Megatron's order; `len` is the number of samples of all epochs that a run needs.

    Args:
        file: an indexed file.
        seq_length: S.
        vocab_size: ids must be below it; each is checked when it is read.
        order: of the run; None = every document once, in the order of the file.
        split: part of the documents; None = all.
        cache_dir: directory in which indices are kept.
        placeholders: ids that no sample may hold; they are compared when it is read, as the ids are.

    Raises:
        DataError: the documents do not fill one sample, or the cache cannot be written.
    """

    columns = ("input_ids", "targets")
    target_length = None
    ordered = True

    def __init__(
        self,
        file: IndexedFile,
        seq_length: int,
        vocab_size: int,
        order: Order | None,
        split: Split | None,
        cache_dir: Path,
        placeholders: Placeholders = NO_PLACEHOLDERS,
    ) -> None:
        self.seq_length, self._file, self._vocab_size = seq_length, file, vocab_size
        self._placeholders = placeholders
        self._start, self._stop = split_bounds(len(file), split)
        self.num_tokens = split_tokens(file, split)
        if self.num_tokens < seq_length + 1:
            raise DataError(
                f"data: {file.prefix}: {self.num_tokens} tokens in {self._stop - self._start} documents do not fill a "
                f"sample of data.seq_length={seq_length}, which takes {seq_length + 1}; lower it or add text"
            )
        self.epochs = count_epochs(self.num_tokens, order.num_samples if order is not None else None, seq_length)
        seed = order.seed if order is not None and order.shuffle else None
        digest = file.digest()
        self._indices = self._cached_indices(seed, cache_dir)
        # str(self.epochs) is part of fingerprints and of cache keys: names in `Epochs` must not change
        content = ["indexed", digest, f"{self._start}:{self._stop}", str(seq_length), str(self.epochs)]
        self.fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices.shuffle)

    @property
    def name(self) -> str:
        """The prefix of the files."""
        return self._file.prefix

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int32: tokens of each document."""
        return self._file.lengths[self._start : self._stop]

    @property
    def num_epoch_samples(self) -> int:
        """Number of samples of one epoch."""
        return (self.num_tokens - 1) // self.seq_length

    def sample(self, index: int) -> Sample:
        """Return sample number `index % len` of the run: (S,) inputs and (S,) targets.

        Raises:
            DataError: the sample holds an id that the model does not have, or one that is no text.
        """
        documents, bounds = self._indices.documents, self._indices.bounds
        place = int(self._indices.shuffle[index % len(self)])
        (first, start), (last, stop) = bounds[place].tolist(), bounds[place + 1].tolist()
        parts = []
        for number in range(first, last + 1):
            begin = start if number == first else 0
            length = stop + 1 - begin if number == last else None
            parts.append(self._file.read(int(documents[number]), begin, length))
        tokens = np.concatenate(parts, dtype=np.int64)
        assert len(tokens) == self.seq_length + 1, (len(tokens), place)
        self._check(tokens, documents[first : last + 1])
        self._placeholders.require_none(tokens, partial(self._place, parts, documents[first : last + 1]))
        return {"input_ids": tokens[:-1], "targets": tokens[1:]}

    def blank(self) -> Sample:
        """Return a sample without loss; see `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, None)

    def describe(self) -> str:
        """Return a line such as `1.2 B tokens in 3,456 documents, 23,437 samples of 512 in 2 epochs`."""
        epochs = f" in {self.epochs.count} epochs" if self.epochs.count > 1 else ""
        epochs += ", the last shuffled separately" if self.epochs.first_samples is not None else ""
        return (
            f"{format_count(self.num_tokens)} tokens in {self._stop - self._start:,} documents, {len(self):,} samples "
            f"of {self.seq_length}{epochs}"
        )

    def usage(self, num_samples: int) -> tuple[SourceUsage, ...]:
        """Return how much a run has used of the file after its first `num_samples` samples."""
        return (SourceUsage(self.name, 1.0, num_samples, num_samples / self.num_epoch_samples),)

    def _place(self, parts: Sequence[np.ndarray], sequences: np.ndarray, position: int) -> str:
        """Return the file and the sequence of a token of a sample.

        Args:
            parts: the sample's tokens, by sequence.
            sequences: their numbers.
            position: of the token in the sample.
        """
        number = int(np.searchsorted(np.cumsum([len(part) for part in parts]), position, "right"))
        return f"{self._file.prefix}: sequence {sequences[number]}"

    def _check(self, tokens: np.ndarray, sequences: np.ndarray) -> None:
        wrong = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
        if len(wrong):
            others = f" or one of the next {len(sequences) - 1}" if len(sequences) > 1 else ""
            raise DataError(
                f"data: {self._file.prefix}: sequence {sequences[0]}{others} holds the id {wrong[0]}, but the model's "
                f"vocab_size={self._vocab_size} ends at {self._vocab_size - 1}; prepare the data with the model's "
                "own tokenizer"
            )

    def _cached_indices(self, seed: int | None, cache_dir: Path) -> Indices:
        lengths = self._file.lengths
        digest = hashlib.sha256(np.ascontiguousarray(lengths[self._start : self._stop]).tobytes())
        decides = (FORMAT_VERSION, self._start, self._stop, self.seq_length, self.epochs, seed)
        digest.update(repr(decides).encode())
        epochs: Epochs = self.epochs

        def make() -> dict[str, np.ndarray]:
            return vars(build_indices(lengths, self._start, self._stop, self.seq_length, epochs, seed))

        return Indices(**cached_arrays(cache_dir, f"{digest.hexdigest()}.indices", _ARRAYS, make))


def split_tokens(file: IndexedFile, split: Split | None) -> int:
    """Return the number of tokens of a part of a file."""
    start, stop = split_bounds(len(file), split)
    return int(file.lengths[start:stop].sum(dtype=np.int64))


def split_bounds(num_documents: int, split: Split | None) -> tuple[int, int]:
    """Return the range [start, stop) of the documents of a part, divided as by Megatron's `--split`.

    Raises:
        DataError: the part would be empty.
    """
    if split is None:
        return 0, num_documents
    fractions = np.asarray([*split.fractions, *[0.0] * (3 - len(split.fractions))], dtype=np.float64)
    bounds = [0.0]
    for fraction in (fractions / fractions.sum()).tolist():
        bounds.append(bounds[-1] + fraction)
    start, stop = (round(bound * float(num_documents)) for bound in bounds[split.part : split.part + 2])
    if start >= stop:
        raise DataError(
            f"data.split={list(split.fractions)} leaves none of {num_documents} documents for part {split.part + 1}; "
            "give it more"
        )
    return start, stop
