"""Concatenation of parts: from a global index to (part, offset)."""

from collections.abc import Iterable

import numpy as np


class ConcatIndex:
    """Index into concatenated parts; parts of size 0 hold nothing.

    Args:
        sizes: of the parts, in order.
    """

    def __init__(self, sizes: Iterable[int] | np.ndarray) -> None:
        self._sizes = np.fromiter(sizes, dtype=np.int64)
        self._ends = np.cumsum(self._sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Return the part that holds a global index, and the offset in it."""
        assert 0 <= index < len(self), f"index {index} of {len(self)}"
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - int(self._ends[part] - self._sizes[part])
