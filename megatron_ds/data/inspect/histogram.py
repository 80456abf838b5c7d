"""Histograms of lengths in few bars."""

from dataclasses import dataclass

import numpy as np

MOST_BARS = 10
LONG = (4096, 16384, 65536, 262144, 1048576)
"""Lengths from which on the tokens of long documents are counted."""


@dataclass(frozen=True)
class Bar:
    """The number of lengths in [first, last]."""

    first: int
    last: int
    count: int


@dataclass(frozen=True)
class LengthHistogram:
    """Lengths in tokens.

    Attributes:
        what: the things measured, such as `documents`.
        count, total, shortest, median, longest: of their lengths.
        bars: of the histogram, in order, empty ones included.
        long: (length, part of all tokens that is in what has this length or more) for each of LONG up to the longest.
    """

    what: str
    count: int
    total: int
    shortest: int
    median: float
    longest: int
    bars: tuple[Bar, ...]
    long: tuple[tuple[int, float], ...] = ()


def length_histogram(what: str, lengths: np.ndarray) -> LengthHistogram:
    """Summarize lengths: bars of one width, or of doubling width where lengths span orders of magnitude."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    edges = _edges(shortest, longest)
    counts, _ = np.histogram(lengths, bins=edges)
    bars = tuple(Bar(first, stop - 1, int(count)) for first, stop, count in zip(edges, edges[1:], counts))
    median = float(np.median(lengths))
    total = int(lengths.sum(dtype=np.int64))
    reached = [least for least in LONG if least <= longest]
    long = tuple((least, int(lengths[lengths >= least].sum(dtype=np.int64)) / total) for least in reached)
    return LengthHistogram(what, len(lengths), total, shortest, median, longest, bars, long)


def _edges(shortest: int, longest: int) -> list[int]:
    """Return the start of each bar and the end of the last: integers, the last above `longest`."""
    if longest - shortest >= MOST_BARS and longest > 16 * max(shortest, 1):
        edges = [0] if shortest == 0 else []
        power = 1 << (max(shortest, 1).bit_length() - 1)
        while power <= longest:
            edges.append(power)
            power *= 2
        return [*edges, power]
    widths = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    width = next(width for width in widths if longest // width - shortest // width < MOST_BARS)
    return list(range(shortest // width * width, longest // width * width + width + 1, width))
