"""Packing of whole conversations into samples: best-fit decreasing (Johnson 1973).

The longest are placed first, each where it leaves the least room; at worst that needs 11/9 of the smallest possible
number of samples, and for conversations of mixed lengths hardly more than it. Conversations of one length are placed in
random order: in the order of the data, neighbours would share a sample and be learned in the same step.
"""

import bisect
from dataclasses import dataclass

import numpy as np

from megatron_ds.data.noise.seeded_random import Purpose, SeededRandom


@dataclass(frozen=True)
class Packs:
    """The conversations of each packed sample.

    Attributes:
        order: (n,) int64: conversations, one sample after the other.
        bounds: (m + 1,) int64: start of each sample in `order`, and the end of the last.
    """

    order: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, index: int) -> np.ndarray:
        """Return the conversations of one sample, in the order of the data."""
        return self.order[self.bounds[index] : self.bounds[index + 1]]


def one_per_sample(count: int) -> Packs:
    """Return packs of one conversation each."""
    return Packs(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def pack(lengths: np.ndarray, seq_length: int) -> Packs:
    """Pack conversations into samples.

    Args:
        lengths: (n,) in tokens, 1 .. seq_length.
        seq_length: S.

    Returns:
        Samples in the order of the first conversation in each: without shuffling, roughly the order of the data.
    """
    assert len(lengths) and lengths.min() >= 1 and lengths.max() <= seq_length, "a conversation does not fit"
    samples = np.empty(len(lengths), dtype=np.int64)  # of each conversation
    samples_by_room: list[list[int]] = [[] for _ in range(seq_length + 1)]  # room: free positions
    rooms: list[int] = []  # those that at least one sample has, ascending
    num_samples = 0
    shuffled = SeededRandom(0, Purpose.PACKING).order(len(lengths))
    for index in shuffled[np.argsort(-lengths[shuffled], kind="stable")].tolist():
        length = int(lengths[index])
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            sample = samples_by_room[room].pop()
            if not samples_by_room[room]:
                del rooms[place]
        else:
            room, sample, num_samples = seq_length, num_samples, num_samples + 1
        samples[index] = sample
        left = room - length
        if left:
            if not samples_by_room[left]:
                bisect.insort(rooms, left)
            samples_by_room[left].append(sample)
    return _in_order(samples, num_samples)


def _in_order(samples: np.ndarray, count: int) -> Packs:
    _, first = np.unique(samples, return_index=True)
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(count)
    place = rank[samples]
    order = np.argsort(place, kind="stable")
    return Packs(order, np.concatenate([[0], np.cumsum(np.bincount(place, minlength=count))]))
