"""Things laid end to end: from a position in the whole to the part that holds it."""

from collections.abc import Iterable

import numpy as np


class Concatenation:
    """Parts of given sizes, one after the other; parts of size 0 hold nothing.

    Args:
        sizes: of the parts, in order.
    """

    def __init__(self, sizes: Iterable[int] | np.ndarray) -> None:
        self._sizes = np.fromiter(sizes, dtype=np.int64)
        self._ends = np.cumsum(self._sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, position: int) -> tuple[int, int]:
        """The part that holds `position`, and the offset of `position` in it."""
        assert 0 <= position < len(self), f"position {position} of {len(self)}"
        part = int(np.searchsorted(self._ends, position, side="right"))
        return part, position - int(self._ends[part] - self._sizes[part])
