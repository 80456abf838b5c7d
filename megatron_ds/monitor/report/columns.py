"""The columns of a metrics file: the numbers of all lines by name, as trackers name them."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ds.monitor.metrics import iter_metrics
from megatron_ds.monitor.trackers.values import line_of

Array = np.ndarray


@dataclass(frozen=True)
class Column:
    """The values of one name.

    Attributes:
        steps: (P,) steps, in order, as float64.
        values: (P,) float64; NaN where a value was not finite.
    """

    steps: Array
    values: Array

    @property
    def last(self) -> float:
        """The last finite value; NaN without one."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if finite.size else math.nan

    @property
    def num_not_finite(self) -> int:
        """Number of values that were NaN or infinite."""
        return int(np.count_nonzero(~np.isfinite(self.values)))


Columns = dict[str, Column]


def read_columns(path: Path | str) -> Columns:
    """Return the columns of a metrics file, in the order in which their names appear.

    Raises:
        DataError: the file is missing or damaged.
    """
    found: dict[str, tuple[array[float], array[float]]] = {}
    for metrics in iter_metrics(path):
        step, values = line_of(metrics)
        for name, value in values.items():
            if name not in found:
                found[name] = (array("d"), array("d"))
            steps, column = found[name]
            steps.append(step)
            column.append(value)
    return {name: Column(np.array(steps), np.array(values)) for name, (steps, values) in found.items()}
