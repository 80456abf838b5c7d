"""Bands of document lengths, and the share of the samples that each gets."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LengthBand:
    """Documents of `least` tokens or more, and of less than `below`; None = of any length above.

    Attributes:
        least, below: in tokens, special ones included.
    """

    least: int = 0
    below: int | None = None

    def __str__(self) -> str:
        """Return the documents in words, such as `documents of 4,096 tokens or more`."""
        if self.below is None:
            return f"documents of {self.least:,} tokens or more" if self.least else "documents of any length"
        if not self.least:
            return f"documents of less than {self.below:,} tokens"
        return f"documents of {self.least:,} to {self.below - 1:,} tokens"


ANY_LENGTH = LengthBand()


def bands_of(shares: Mapping[int, float]) -> dict[LengthBand, float]:
    """Return the band that begins at each length, the shortest first, with its share.

    A band ends where the next begins. Documents that are shorter than the first are in no band.
    """
    bounds = sorted(shares)
    return {LengthBand(least, below): shares[least] for least, below in zip(bounds, [*bounds[1:], None])}
