"""Keys and values of earlier positions, kept while rows are continued token by token.

They are kept after norms and rotation, as each layer's attention core takes them. All layers of a module share one
`Continuation`, which states how far its rows have come.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.layers.attention_masks import Span


@dataclass
class Continuation:
    """Rows of one length that grow by the same positions.

    Shorter texts have padding on the left, which is a document of its own: no token attends to it, and positions begin
    at 0 behind it.

    Attributes:
        capacity: the most positions of a row, padding included.
        num_past: number of positions whose keys and values are kept.
        positions: (B, capacity), the position of each entry within its document; None = no row has padding.
    """

    capacity: int
    num_past: int = 0
    positions: Tensor | None = None

    def new_positions(self, count: int, batch: int, device: torch.device) -> Tensor:
        """Return the positions of the next `count` entries of each row, (B, count)."""
        end = self.num_past + count
        assert end <= self.capacity, (self.num_past, count, self.capacity)
        if self.positions is not None:
            return self.positions[:, self.num_past : end].contiguous()
        return torch.arange(self.num_past, end, device=device).repeat(batch, 1)


class KeyValueCache:
    """The keys and values of one self-attention layer, each (positions, B, heads, D) of this tensor rank's heads.

    Of a layer with a window those are kept that a later query sees. The memory is allocated once: for the capacity, or
    for two windows, of which the second is moved to the front when it is full.

    Args:
        rows: the rows that grow.
        window: a query sees the keys less than this far from it; None = all.
    """

    def __init__(self, rows: Continuation, window: int | None) -> None:
        self.rows = rows
        self.num_seen = rows.capacity if window is None else min(rows.capacity, window - 1)
        self.size = rows.capacity if window is None else min(rows.capacity, max(2 * window, 1))
        self._memory: tuple[Tensor, Tensor] | None = None
        self._used = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Span | None]:
        """Add the keys and values of new positions.

        Args:
            k, v: (S, B, heads, D).

        Returns:
            those that the new queries see, and the positions of both; None = all of them are new.
        """
        count, past = len(k), self.rows.num_past
        if self._memory is None:
            shape = (self.size, *k.shape[1:])
            self._memory = k.new_empty(shape), v.new_empty(shape)
        if past == 0:
            self._used = 0
            kept = count if count <= self.size else self.num_seen
            self._write(k[count - kept :], v[count - kept :])
            return k, v, None
        if self._used + count > self.size:
            self._forget()
        self._write(k, v)
        end = past + count
        span = Span(range(past, end), range(end - self._used, end), self.rows.capacity)
        keys, values = self._memory
        return keys[: self._used], values[: self._used], span

    def _write(self, k: Tensor, v: Tensor) -> None:
        assert self._memory is not None and self._used + len(k) <= self.size, (self._used, len(k), self.size)
        for memory, new in zip(self._memory, (k, v)):
            memory[self._used : self._used + len(new)] = new
        self._used += len(k)

    def _forget(self) -> None:
        """Keep what the next query sees, at the front."""
        assert self._memory is not None
        kept = min(self.num_seen, self._used)
        for memory in self._memory:
            memory[:kept] = memory[self._used - kept : self._used].clone()
        self._used = kept


class SourceCache:
    """The keys and values of one cross-attention layer, which are projected once: (C, B, heads, D) each."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None
