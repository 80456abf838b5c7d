"""Reproducible random numbers keyed by (seed, purpose, sample index).

All are computed from raw 64-bit numbers of numpy's PCG64, seeded with SeedSequence(seed, spawn_key=key). numpy promises
that these never change between versions, which it does not for the methods of `Generator`. A key that begins with a
`Purpose` separates the streams of different purposes.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """The first number of a key (seed, purpose, index); a number is never given to another purpose."""

    MASKING = 1
    PAIRING = 2
    CORRUPTION = 3
    PACKING = 4
    HOLDING_OUT = 5


class SeededRandom:
    """The random stream of one key.

    Args:
        seed: not negative.
        key: purpose and index, such as (Purpose.MASKING, index); no number is negative.
    """

    def __init__(self, seed: int, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=tuple(int(number) for number in key)))

    def integer(self, bound: int) -> int:
        """Return one of 0 .. bound - 1. Their probabilities differ by a factor of at most 1 + bound / 2**64."""
        assert bound > 0, f"an integer below {bound}"
        return int(self._bits.random_raw()) % bound

    def integers(self, bound: int, size: int) -> np.ndarray:
        """Return (size,) int64, each as by `integer`."""
        assert bound > 0, f"an integer below {bound}"
        return (self._bits.random_raw(size) % np.uint64(bound)).astype(np.int64)

    def fractions(self, size: int) -> np.ndarray:
        """Return (size,) float64 in [0, 1): multiples of 2**-53."""
        return (self._bits.random_raw(size) >> np.uint64(11)) * 2.0**-53

    def order(self, size: int) -> np.ndarray:
        """Return a permutation of 0 .. size - 1: the stable argsort of `size` raw numbers; (size,) int64."""
        return np.argsort(self._bits.random_raw(size), kind="stable")

    def choice(self, number: int, size: int) -> np.ndarray:
        """Return `number` distinct integers of [0, size) in ascending order: (number,) int64."""
        assert 0 <= number <= size, f"{number} of {size}"
        return np.sort(self.order(size)[:number])
