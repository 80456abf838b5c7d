"""A ledger of memory: what is held, by part, and the moment at which it is most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Ledger:
    """Bytes in one memory, by part.

    Attributes:
        parts: part -> bytes that are held now.
        moment: text for the present time, which the peak is remembered with.
        peak_bytes: the most that was held at once.
        peak_parts: part -> bytes at that time.
        peak_moment: `moment` at that time.
    """

    def __init__(self) -> None:
        self.parts: Counter[str] = Counter()
        self.moment = ""
        self.peak_bytes = 0
        self.peak_parts: Mapping[str, int] = {}
        self.peak_moment = ""
        self._total_bytes = 0

    @property
    def total_bytes(self) -> int:
        """Bytes that are held now."""
        return self._total_bytes

    def add(self, part: str, num_bytes: int) -> None:
        """Hold more of a part; less, if the number is negative."""
        self.parts[part] += num_bytes
        self._total_bytes += num_bytes
        if self._total_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_moment = self._total_bytes, self.moment
            self.peak_parts = {name: held for name, held in self.parts.items() if held}

    def hold(self, part: str, num_bytes: int) -> None:
        """Hold this much of a part, whatever it was before."""
        self.add(part, num_bytes - self.parts[part])

    def release(self, part: str, num_bytes: int | None = None) -> None:
        """Hold less of a part; None = nothing of it."""
        self.add(part, -(self.parts[part] if num_bytes is None else num_bytes))

    @contextmanager
    def holding(self, part: str, num_bytes: int) -> Iterator[None]:
        """Hold more of a part within the block."""
        self.add(part, num_bytes)
        yield
        self.release(part, num_bytes)

    def reset_peak(self) -> None:
        """Begin the search for the peak again, from what is held now."""
        self.peak_bytes = 0
        self.add("", 0)
