"""Rows of a source as tokens, one after the other: what every kind of cached rows has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ds.data.readers.array_files import check_starts
from megatron_ds.data.readers.bad_rows import BadRows
from megatron_ds.data.readers.source import Source


@dataclass(frozen=True)
class CachedRows:
    """The rows of one source as tokens, memory-mapped, one after the other.

    Attributes:
        key: hash of their content.
        source: the source that they were read from.
        ids: (T,) int32.
        starts: (n + 1,) int64: start of each row, and the end of the last.
        places: (n,) place of each in the source, such as `:7`; follows the source's name in errors.
        bad_count: (1,) int64: number of rows that were left out.
        bad_first: place and reason of the first of them.
    """

    key: str
    source: Source
    ids: np.ndarray
    starts: np.ndarray
    places: np.ndarray
    bad_count: np.ndarray | None = field(default=None, kw_only=True)
    bad_first: np.ndarray | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, in tokens."""
        return np.diff(self.starts)

    @property
    def bad_rows(self) -> BadRows:
        """Account of the rows that were left out."""
        return BadRows.of_arrays(self.bad_count, self.bad_first, self.source.prefix)

    def where(self, index: int) -> str:
        """Return file and line of a row, for errors."""
        return f"{self.source.prefix}{self.places[index]}"


def check_rows(arrays: Mapping[str, np.ndarray], of_tokens: Sequence[str], of_rows: Sequence[str] = ()) -> None:
    """Check that the arrays of `CachedRows` fit one another.

    Args:
        arrays: the arrays, by name.
        of_tokens: names of those with an entry for each token, besides `ids`.
        of_rows: names of those with an entry for each row, besides `places`.

    Raises:
        ValueError: they do not.
    """
    starts, ids = arrays["starts"], arrays["ids"]
    check_starts(starts, len(ids), "starts")
    sizes = {**dict.fromkeys(of_tokens, len(ids)), **dict.fromkeys(("places", *of_rows), len(starts) - 1)}
    for name, size in sizes.items():
        if len(arrays[name]) != size:
            raise ValueError(f"{name} has {len(arrays[name])} entries, not {size}")
