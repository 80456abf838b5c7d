"""Samples out of a pair of indexed files, one token further on than the inputs the targets."""

import hashlib
from dataclasses import fields
from pathlib import Path

import numpy as np

from megatron_ds.data.dataset import Sample, blank_sample
from megatron_ds.data.indexed.files import IndexedFile
from megatron_ds.data.indexed.order import Epochs, Indices, build_indices, count_epochs
from megatron_ds.data.options import Order, Split
from megatron_ds.data.readers.array_cache import cached_arrays
from megatron_ds.data.text.corpus import count
from megatron_ds.errors import DataError

FORMAT_VERSION = 1


class IndexedDataset:
    """Some documents of a file in Megatron's order; `len` is the samples of all epochs that a run needs.

    Args:
        file: what is read.
        seq_length: S.
        vocab_size: ids must be below it; each is looked at when it is read.
        order: how the run goes through it; None = all of it once, as it stands.
        split: which documents; None = all.
        cache_dir: where indices are kept.

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
    ) -> None:
        self.seq_length, self._file, self._vocab_size = seq_length, file, vocab_size
        self._start, self._stop = part_of(len(file), split)
        self.num_tokens = tokens_of(file, split)
        if self.num_tokens < seq_length + 1:
            raise DataError(
                f"data: {file.prefix}: {self.num_tokens} tokens in {self._stop - self._start} documents do not fill a "
                f"sample of data.seq_length={seq_length}, which takes {seq_length + 1}; lower it or add text"
            )
        self.epochs = count_epochs(self.num_tokens, order.num_samples if order is not None else None, seq_length)
        seed = order.seed if order is not None and order.shuffle else None
        digest = file.digest()
        self._indices = self._cached_indices(seed, cache_dir)
        content = ["indexed", digest, f"{self._start}:{self._stop}", str(seq_length), str(self.epochs)]
        self.fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices.shuffle)

    @property
    def name(self) -> str:
        """The prefix."""
        return self._file.prefix

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int32: tokens of each document."""
        return self._file.lengths[self._start : self._stop]

    @property
    def num_epoch_samples(self) -> int:
        """Samples that the documents hold once."""
        return (self.num_tokens - 1) // self.seq_length

    def sample(self, index: int) -> Sample:
        """The sample that is taken as number `index % len`: (S,) inputs and (S,) targets.

        Raises:
            DataError: it holds an id that the model does not have.
        """
        documents, bounds = self._indices.documents, self._indices.bounds
        at = int(self._indices.shuffle[index % len(self)])
        (first, start), (last, stop) = bounds[at].tolist(), bounds[at + 1].tolist()
        parts = []
        for place in range(first, last + 1):
            begin = start if place == first else 0
            length = stop + 1 - begin if place == last else None
            parts.append(self._file.read(int(documents[place]), begin, length))
        tokens = np.concatenate(parts, dtype=np.int64)
        assert len(tokens) == self.seq_length + 1, (len(tokens), at)
        self._check(tokens, documents[first : last + 1])
        return {"input_ids": tokens[:-1], "targets": tokens[1:]}

    def blank(self) -> Sample:
        """See `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, None)

    def describe(self) -> str:
        """Such as `1.2 B tokens in 3,456 documents, 23,437 samples of 512 in 2 epochs`."""
        epochs = f" in {self.epochs.count} epochs" if self.epochs.count > 1 else ""
        epochs += ", the last apart" if self.epochs.first_samples is not None else ""
        return (
            f"{count(self.num_tokens)} tokens in {self._stop - self._start:,} documents, {len(self):,} samples of "
            f"{self.seq_length}{epochs}"
        )

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

        names = [field.name for field in fields(Indices)]
        return Indices(**cached_arrays(cache_dir, f"{digest.hexdigest()}.indices", names, make))


def tokens_of(file: IndexedFile, split: Split | None) -> int:
    """Of the documents of a part."""
    start, stop = part_of(len(file), split)
    return int(file.lengths[start:stop].sum(dtype=np.int64))


def part_of(num_documents: int, split: Split | None) -> tuple[int, int]:
    """The first document of a part and the one behind its last, as Megatron's `--split` cuts.

    Raises:
        DataError: the part would be empty.
    """
    if split is None:
        return 0, num_documents
    shares = np.asarray([*split.fractions, *[0.0] * (3 - len(split.fractions))], dtype=np.float64)
    ends = [0.0]
    for share in (shares / shares.sum()).tolist():
        ends.append(ends[-1] + share)
    start, stop = (round(end * float(num_documents)) for end in ends[split.part : split.part + 2])
    if start >= stop:
        raise DataError(
            f"data.split={list(split.fractions)} leaves none of {num_documents} documents for part {split.part + 1}; "
            "give it more"
        )
    return start, stop
