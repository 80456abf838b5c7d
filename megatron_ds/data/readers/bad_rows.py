"""Account of the rows of sources that hold no usable example: refused, or left out, counted and named."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

import numpy as np

from megatron_ds.errors import DataError
from megatron_ds.log import get_logger

MOST_NAMED = 10
"""Number of bad rows that are named; more are only counted."""

BAD_ARRAYS = {"bad_count": "i8 1", "bad_first": "U 1"}
"""Names of the arrays of an account in a cache; a source without bad rows has none."""


@dataclass
class BadRows:
    """Rows without a usable example.

    Attributes:
        skip: leave them out; otherwise the first of them is an error.
        count: number of rows that were left out.
        first: place and reason of the first of them, such as `data.jsonl:7: not JSON (...)`.
    """

    skip: bool = False
    count: int = 0
    first: list[str] = field(default_factory=list)

    @property
    def note(self) -> str:
        """A text such as `, 2 bad rows left out`, for the end of a description; empty without such rows."""
        return f", {self.count:,} bad row{'s' * (self.count != 1)} left out" if self.count else ""

    @classmethod
    def of_arrays(cls, count: np.ndarray | None, first: np.ndarray | None, prefix: str) -> Self:
        """Return the account in `arrays`; None = none was written.

        Args:
            count: (1,) int64.
            first: places and reasons, without the source's name.
            prefix: the source's name in places.
        """
        if count is None or first is None:
            return cls()
        return cls(True, int(count[0]), [f"{prefix}{one}" for one in first])

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the account as arrays for a cache, in which a source has no name; empty without bad rows."""
        if not self.count:
            return {}
        places = [one.removeprefix(prefix) for one in self.first]
        return dict(zip(BAD_ARRAYS, (np.asarray([self.count]), np.asarray(places)), strict=True))

    def add(self, problem: DataError) -> None:
        """Leave out the row that has this problem.

        Raises:
            DataError: `problem`, if bad rows are refused.
        """
        if not self.skip:
            raise problem
        self.count += 1
        if len(self.first) < MOST_NAMED:
            self.first.append(str(problem).removeprefix("data: "))

    def include(self, others: "BadRows") -> None:
        """Add the rows of another account."""
        self.count += others.count
        self.first = [*self.first, *others.first][:MOST_NAMED]

    def refuse_all(self, source: object) -> None:
        """Refuse a source of which no row is left, if rows were left out.

        Raises:
            DataError: names the first of them.
        """
        if self.count:
            raise DataError(f"data: {source}: all {self.count:,} rows are bad, the first at {self.first[0]}")

    def require_skip(self, skip: bool) -> None:
        """Refuse the rows, which an earlier run has left out, unless this one leaves them out too.

        Raises:
            DataError: the first of them.
        """
        if self.count and not skip:
            raise DataError(f"data: {self.first[0]}")

    def log(self) -> None:
        """Write the count and the first of the rows to the log of the run."""
        if not self.count:
            return
        logger = get_logger("data")
        logger.info("data.bad_rows=skip: %s", self.note.removeprefix(", "))
        for one in self.first:
            logger.info("  %s", one)
        if self.count > len(self.first):
            logger.info("  ... and %s more", f"{self.count - len(self.first):,}")


@runtime_checkable
class HasBadRows(Protocol):
    """A dataset that keeps account of the rows that it leaves out."""

    @property
    def bad_rows(self) -> BadRows:
        """Account of the rows that were left out."""


def total_bad_rows(datasets: Iterable[object]) -> BadRows:
    """Return the rows that several datasets have left out; those that keep no account count for none."""
    total = BadRows()
    for one in datasets:
        if isinstance(one, HasBadRows):
            total.include(one.bad_rows)
    return total
