"""Predictions of times between measured ones: surfaces over the sizes of operations, and curves over bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
from numpy.typing import NDArray

_NOISE = 0.02
"""Relative error of a measured time that the surface need not follow, in units of the distance of doubled sizes."""


@dataclass(frozen=True)
class Surface:
    """A correction factor of a formula as a smooth function of the logarithms of sizes.

    It is a sum of cones around the measured points (radial basis functions that grow linearly; Powell 1992), which
    needs no grid of them. Far from all points it stays between the smallest and the largest measured factor.
    """

    points: NDArray[np.float64]
    weights: NDArray[np.float64]
    constant: float
    lowest: float
    highest: float

    @classmethod
    def through(cls, sizes: Sequence[Sequence[float]], factors: Sequence[float]) -> Surface:
        """Return the surface through measured points.

        Args:
            sizes: of each point, all above 0.
            factors: measured time divided by the formula's, of each point.
        """
        points = np.log2(np.asarray(sizes, dtype=np.float64))
        values = np.log(np.asarray(factors, dtype=np.float64))
        count = len(points)
        system = np.zeros((count + 1, count + 1))
        system[:count, :count] = -np.linalg.norm(points[:, None] - points[None], axis=-1)
        system[:count, :count] -= _NOISE * np.eye(count)
        system[:count, count] = system[count, :count] = 1.0
        solution = np.linalg.lstsq(system, np.append(values, 0.0), rcond=None)[0]
        return cls(points, solution[:count], float(solution[count]), float(values.min()), float(values.max()))

    def factor(self, sizes: Sequence[float]) -> float:
        """Return the factor at some sizes."""
        distances = np.linalg.norm(self.points - np.log2(np.asarray(sizes, dtype=np.float64)), axis=1)
        value = self.constant - float(distances @ self.weights)
        return exp(min(max(value, self.lowest), self.highest))


@dataclass(frozen=True)
class Curve:
    """Seconds by bytes: straight between measured points, as a latency and a bandwidth are, and constant below them.

    Above the largest one they grow in proportion.
    """

    num_bytes: tuple[float, ...]
    times_s: tuple[float, ...]

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """Return the curve through pairs of bytes and seconds."""
        ordered = sorted(points)
        return cls(tuple(one for one, _ in ordered), tuple(time_s for _, time_s in ordered))

    def seconds(self, num_bytes: float) -> float:
        """Return the seconds of a number of bytes."""
        above = bisect_right(self.num_bytes, num_bytes)
        if above == 0:
            return self.times_s[0]
        if above == len(self.num_bytes):
            return self.times_s[-1] * num_bytes / self.num_bytes[-1]
        low, high = self.num_bytes[above - 1], self.num_bytes[above]
        share = (num_bytes - low) / (high - low)
        return (1 - share) * self.times_s[above - 1] + share * self.times_s[above]
