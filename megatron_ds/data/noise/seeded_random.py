"""Chance that can be drawn again: what is random about a sample depends on the seed and the sample's index alone.

Everything is made of raw 64-bit draws of numpy's PCG64, seeded with SeedSequence(seed, spawn_key=key). numpy promises
that those never change from version to version, which it does not for the methods of `Generator`. A key that begins
with a `Purpose` keeps what is drawn for one purpose apart from what is drawn for another.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """The first number of a key (seed, purpose, index); a number is never given to another purpose."""

    MASKING = 1
    PAIRING = 2
    CORRUPTION = 3
    PACKING = 4


class Draws:
    """The draws of one key, one after the other.

    Args:
        seed: not negative.
        key: what the draws are for, such as (Purpose.MASKING, index); no number is negative.
    """

    def __init__(self, seed: int, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=tuple(int(number) for number in key)))

    def integer(self, bound: int) -> int:
        """One of 0 .. bound - 1. No integer is likelier than another by more than bound / 2**64 of itself."""
        assert bound > 0, f"an integer below {bound}"
        return int(self._bits.random_raw()) % bound

    def integers(self, bound: int, size: int) -> np.ndarray:
        """(size,) int64, each as `integer`."""
        assert bound > 0, f"an integer below {bound}"
        return (self._bits.random_raw(size) % np.uint64(bound)).astype(np.int64)

    def fractions(self, size: int) -> np.ndarray:
        """(size,) float64 in [0, 1): multiples of 2**-53."""
        return (self._bits.random_raw(size) >> np.uint64(11)) * 2.0**-53

    def order(self, size: int) -> np.ndarray:
        """A permutation of 0 .. size - 1: the stable argsort of as many draws; (size,) int64."""
        return np.argsort(self._bits.random_raw(size), kind="stable")

    def choice(self, number: int, size: int) -> np.ndarray:
        """`number` different ones of 0 .. size - 1, ascending: (number,) int64."""
        assert 0 <= number <= size, f"{number} of {size}"
        return np.sort(self.order(size)[:number])
