"""The order of samples of Megatron's GPTDataset.

The documents of all epochs that the run needs are shuffled as one and concatenated. Sample k is the S + 1 tokens from
position k S on, so that each token but the first is a target once; then samples are shuffled too. If the run needs less
than 80 % of the last epoch, that epoch's documents and samples are shuffled separately and come last.

The random numbers are those of one numpy.random.RandomState(seed), which numpy has frozen.
"""

from dataclasses import dataclass

import numpy as np

_SEPARATE_BELOW = 0.80


@dataclass(frozen=True)
class Epochs:
    """The number of passes over the documents. The names in this class are part of fingerprints and cache keys.

    Attributes:
        count: E, number of epochs.
        first_samples: samples before the last epoch if it is shuffled separately, else None.
    """

    count: int
    first_samples: int | None


@dataclass(frozen=True)
class Indices:
    """The places of all samples; each array is a file of the cache.

    Attributes:
        documents: (E * number of documents,) int32, in the order of concatenation.
        bounds: (samples + 1, 2): start of each sample: index in `documents`, and token in that document.
        shuffle: (samples,) the samples in the order of the run.
    """

    documents: np.ndarray
    bounds: np.ndarray
    shuffle: np.ndarray


def count_epochs(num_tokens: int, num_samples: int | None, seq_length: int) -> Epochs:
    """Return the smallest number of epochs that holds so many samples.

    Args:
        num_tokens: T, tokens of an epoch.
        num_samples: None = one epoch.
        seq_length: S.
    """
    if num_samples is None:
        return Epochs(1, None)
    count = max(1, -(-(num_samples * seq_length + 1) // num_tokens))
    if count == 1:
        return Epochs(1, None)
    first = ((count - 1) * num_tokens - 1) // seq_length
    in_epoch = (num_tokens - 1) // seq_length
    return Epochs(count, first if num_samples - first < int(_SEPARATE_BELOW * in_epoch) else None)


def build_indices(
    lengths: np.ndarray, start: int, stop: int, seq_length: int, epochs: Epochs, seed: int | None
) -> Indices:
    """Return the indices of a range of a file's sequences.

    Args:
        lengths: (N,) int32, tokens of each sequence of the file.
        start, stop: the range of sequences, which Megatron calls documents here.
        seq_length: S.
        epochs: see `count_epochs`.
        seed: of the order; None = in the order of the file.
    """
    random = np.random.RandomState(seed) if seed is not None else None
    documents = _documents(start, stop, epochs, random)
    num_tokens = int(lengths[start:stop].sum(dtype=np.int64))
    num_samples = (epochs.count * num_tokens - 1) // seq_length
    bounds = _bounds(lengths, documents, seq_length, num_samples)
    return Indices(documents, bounds, _shuffle(num_samples, epochs.first_samples, random))


def _documents(start: int, stop: int, epochs: Epochs, random: np.random.RandomState | None) -> np.ndarray:
    once = np.arange(start, stop, dtype=np.int32)
    if epochs.first_samples is None:
        parts = [np.tile(once, epochs.count)]
    else:
        parts = [np.tile(once, epochs.count - 1), once]
    for part in parts:
        if random is not None:
            random.shuffle(part)
    return np.concatenate(parts)


def _bounds(lengths: np.ndarray, documents: np.ndarray, seq_length: int, num_samples: int) -> np.ndarray:
    """Return the document that holds every S-th token from the first on, and the token's place in it."""
    most = max(len(documents), int(lengths.max(initial=0)))
    dtype = np.int32 if most <= np.iinfo(np.int32).max else np.int64
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    tokens = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    holders = np.searchsorted(ends, tokens, side="right")
    holders[0] = 0  # even if it is empty
    offsets = tokens - (ends[holders] - lengths[documents[holders]])
    offsets[0] = 0
    return np.stack([holders, offsets], axis=1).astype(dtype)


def _shuffle(num_samples: int, first_samples: int | None, random: np.random.RandomState | None) -> np.ndarray:
    dtype = np.uint32 if num_samples < np.iinfo(np.uint32).max - 1 else np.int64
    order = np.arange(num_samples, dtype=dtype)
    if random is not None:
        for part in (order,) if first_samples is None else (order[:first_samples], order[first_samples:]):
            random.shuffle(part)
    return order
