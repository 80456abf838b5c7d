"""Packing: every conversation once, none cut, hardly more sequences than there must be."""

import time

import numpy as np
import pytest

from megatron_ds.data.chat.packing import one_per_sample, pack


def first_fit(lengths: np.ndarray, seq_length: int) -> int:
    """Sequences that the simplest packing in the order of the data takes."""
    rooms: list[int] = []
    for length in lengths.tolist():
        at = next((index for index, room in enumerate(rooms) if room >= length), None)
        if at is None:
            rooms.append(seq_length - length)
        else:
            rooms[at] -= length
    return len(rooms)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("seq_length", [1, 7, 64, 512])
def test_each_once_and_none_too_long(seed: int, seq_length: int) -> None:
    chance = np.random.default_rng(seed)
    lengths = chance.integers(1, seq_length + 1, size=int(chance.integers(1, 400)))
    packs = pack(lengths, seq_length)
    assert sorted(packs.order.tolist()) == list(range(len(lengths)))
    members = [packs.members(index) for index in range(len(packs))]
    assert all(len(one) and lengths[one].sum() <= seq_length and (np.diff(one) > 0).all() for one in members)
    firsts = [one[0] for one in members]
    assert firsts == sorted(firsts)
    assert len(packs) <= first_fit(lengths, seq_length)


@pytest.mark.parametrize("seed", range(5))
def test_conversations_of_mixed_lengths_fill_their_sequences(seed: int) -> None:
    """Within 2 % of the fewest sequences that there can be."""
    chance = np.random.default_rng(seed)
    lengths = np.clip(chance.lognormal(4.5, 0.8, size=5000).astype(np.int64), 1, 1024)
    packs = pack(lengths, 1024)
    assert len(packs) <= 1.02 * -(-lengths.sum() // 1024)


def test_what_can_be_filled_is_filled() -> None:
    packs = pack(np.array([3, 5, 4, 4, 2, 6]), 8)
    assert [packs.members(index).tolist() for index in range(len(packs))] == [[0, 1], [2, 3], [4, 5]]
    assert [one_per_sample(3).members(index).tolist() for index in range(3)] == [[0], [1], [2]]


def test_many_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(10, 3000, size=200_000)
    began = time.perf_counter()
    pack(lengths, 4096)
    assert time.perf_counter() - began < 10
