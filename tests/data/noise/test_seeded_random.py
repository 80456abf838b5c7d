"""SeededRandom: fixed for ever by their key, apart from one another, and uniform."""

import numpy as np
import pytest

from megatron_ds.data.noise.seeded_random import Purpose, SeededRandom
from megatron_ds.data.readers.concat_index import ConcatIndex
from tests.data.dataset_checks import assert_share


def test_draws_never_change_between_versions():
    """Written down once: other draws would silently change the noise of every resumed run."""
    draws = SeededRandom(1234, Purpose.MASKING, 7)
    assert draws.integer(1000) == 504
    assert draws.integers(1000, 5).tolist() == [972, 696, 438, 318, 47]
    assert draws.order(5).tolist() == [0, 1, 4, 2, 3]
    assert draws.choice(3, 10).tolist() == [0, 2, 3]
    assert draws.fractions(2).tolist() == [0.48943986532816197, 0.6415366704430264]
    assert [int(purpose) for purpose in Purpose] == [1, 2, 3, 4, 5]


def test_keys_are_told_apart():
    keys = [(), (0,), (0, 0), (1, 0), (0, 1), (1, 2**32), (1, 2**32 + 1), (1, 1), (1, 2**40)]
    firsts = {SeededRandom(5, *key).integer(2**62) for key in keys}
    assert len(firsts | {SeededRandom(6, *key).integer(2**62) for key in keys}) == 2 * len(keys)
    assert SeededRandom(5, 1, np.int64(3)).integer(2**62) == SeededRandom(5, 1, 3).integer(2**62)


def test_each_outcome_is_as_likely_as_the_others():
    draws = SeededRandom(0, 1)
    numbers = draws.integers(7, 20_000)
    choices = np.stack([draws.choice(2, 5) for _ in range(5000)])
    for value in range(7):
        assert_share(int((numbers == value).sum()), len(numbers), 1 / 7)
    for value in range(5):
        assert_share(int((choices == value).any(axis=1).sum()), len(choices), 2 / 5)
    fractions = draws.fractions(20_000)
    assert fractions.min() >= 0 and fractions.max() < 1
    assert_share(int((fractions < 0.8).sum()), len(fractions), 0.8)


@pytest.mark.parametrize("sizes", [[3, 0, 1, 0, 4], [0, 0, 2], [1], [5, 0]])
def test_every_position_of_a_concatenation_is_found(sizes):
    whole = ConcatIndex(sizes)
    expected = [(part, offset) for part, size in enumerate(sizes) for offset in range(size)]
    assert [whole.locate(position) for position in range(len(whole))] == expected
    assert len(ConcatIndex([])) == 0
