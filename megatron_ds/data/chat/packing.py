"""Which conversations share a sequence: best-fit decreasing (Johnson 1973), whole conversations only.

The longest are placed first, each where it leaves the least room; at worst that takes 11/9 of the fewest sequences
possible, and for conversations of mixed lengths hardly more than these. Those of one length come in a drawn order: in
that of the data, what was written one after the other would share a sequence, and be learned at once.
"""

import bisect
from dataclasses import dataclass

import numpy as np

from megatron_ds.data.noise.seeded_random import Draws, Purpose


@dataclass(frozen=True)
class Packs:
    """What shares a sequence.

    Attributes:
        order: (n,) int64: conversations, one sequence after the other.
        bounds: (m + 1,) int64: where each sequence begins in `order`, and the end of the last.
    """

    order: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def members(self, index: int) -> np.ndarray:
        """The conversations in one sequence, in the order in which they stand in the data."""
        return self.order[self.bounds[index] : self.bounds[index + 1]]


def one_each(count: int) -> Packs:
    """Every conversation in a sequence of its own."""
    return Packs(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def pack(lengths: np.ndarray, seq_length: int) -> Packs:
    """Put conversations together.

    Args:
        lengths: (n,) in tokens, 1 .. seq_length.
        seq_length: S.

    Returns:
        sequences in the order of the first conversation in each, so that without shuffling the data come about in
        their order.
    """
    assert len(lengths) and lengths.min() >= 1 and lengths.max() <= seq_length, "a conversation does not fit"
    sequence_of = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(seq_length + 1)]  # by free positions
    rooms: list[int] = []  # those that any sequence has, ascending
    opened = 0
    drawn = Draws(0, Purpose.PACKING).order(len(lengths))
    for index in drawn[np.argsort(-lengths[drawn], kind="stable")].tolist():
        length = int(lengths[index])
        at = bisect.bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, sequence, opened = seq_length, opened, opened + 1
        sequence_of[index] = sequence
        left = room - length
        if left:
            if not with_room[left]:
                bisect.insort(rooms, left)
            with_room[left].append(sequence)
    return _in_order(sequence_of, opened)


def _in_order(sequence_of: np.ndarray, count: int) -> Packs:
    _, first = np.unique(sequence_of, return_index=True)
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(count)
    place = rank[sequence_of]
    order = np.argsort(place, kind="stable")
    return Packs(order, np.concatenate([[0], np.cumsum(np.bincount(place, minlength=count))]))
