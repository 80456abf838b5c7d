"""Masks of the keys that each query sees, for attention by PyTorch's functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_QUERIES, MOST_QUERIES = 256, 1024
"""Queries of a tile; in between, an eighth of the keys. Smaller tiles take longer in torch's kernels than they save.

On 2 cores of a CPU, 4,096 causal queries after 2,048 others took 3.3 s forward and backward at once, and 2.4 s in tiles
of 1,024; 512 took 34 ms, and 26 ms in tiles of 256.
"""


@dataclass(frozen=True)
class Span:
    """Some consecutive queries of a row and the consecutive keys that they are computed with, as positions.

    Attributes:
        queries, keys: the positions.
        length: of the row.
    """

    queries: range
    keys: range
    length: int

    @classmethod
    def of_row(cls, length: int) -> Span:
        """Return all queries and keys of a row."""
        return cls(range(length), range(length), length)

    @property
    def offset(self) -> int:
        """Index of the key at the position of the first query."""
        return self.queries.start - self.keys.start

    def tiles(self, causal: bool, window: int | None) -> list[Span]:
        """Cut the queries into tiles with the keys that they see, so that few pairs are computed to be masked."""
        size = min(max(len(self.keys) // 8, LEAST_QUERIES), MOST_QUERIES)
        found = []
        for start in range(self.queries.start, self.queries.stop, size):
            seen = seen_by(range(start, min(start + size, self.queries.stop)), self.length, causal, window)
            keys = range(max(seen.keys.start, self.keys.start), min(seen.keys.stop, self.keys.stop))
            found.append(Span(seen.queries, keys, self.length))
        return found

    def of_queries(self, by_position: Tensor) -> Tensor:
        """Cut the last dim, of all positions of the row, to the queries."""
        return by_position[..., self.queries.start : self.queries.stop]

    def of_keys(self, by_position: Tensor) -> Tensor:
        """Cut the last dim, of all positions of the row, to the keys."""
        return by_position[..., self.keys.start : self.keys.stop]

    def index_of(self, part: Span) -> tuple[slice, slice]:
        """Return where the queries and the keys of a part of this span are among its own."""
        first_query, first_key = self.queries.start, self.keys.start
        return (
            slice(part.queries.start - first_query, part.queries.stop - first_query),
            slice(part.keys.start - first_key, part.keys.stop - first_key),
        )


def seen_by(queries: range, length: int, causal: bool, window: int | None) -> Span:
    """Return consecutive queries with the range of the keys, of a row of `length`, that any of them sees."""
    reach = length if window is None else window - 1
    stop = queries.stop if causal else min(length, queries.stop + reach)
    return Span(queries, range(max(0, queries.start - reach), stop), length)


class Row(NamedTuple):
    """The tensors that attention reads besides queries, keys and values: those of whole rows on every context rank.

    Attributes:
        key_mask: (B, S or C), nonzero where a position may be attended to; None = everywhere.
        positions: (B, S) positions within the documents of a packed sequence, 0 where a document begins; None = one
            document.
        bounds: (B, D + 1) positions where these documents begin, for kernels that read them.
        distances: (heads, 2S - 1), what `RelativeBias` returns; None = no such biases.
    """

    key_mask: Tensor | None = None
    positions: Tensor | None = None
    bounds: Tensor | None = None
    distances: Tensor | None = None


def allowed_keys(
    length: int,
    window: int | None,
    key_mask: Tensor | None,
    device: torch.device,
    positions: Tensor | None = None,
    span: Span | None = None,
) -> Tensor | None:
    """Return the mask of the keys that each query sees, (B or 1, 1, S, S) bool; None if plain causality is enough.

    With `positions` (B, S), 0 where a document begins, a query sees keys of its own document only. With a key mask it
    may see none; see `without_blind_rows`. A `span` cuts the mask to some queries and keys.
    """
    is_plain = key_mask is None and positions is None and (window is None or window >= length)
    if is_plain and span in (None, Span.of_row(length)):
        return None
    span = span or Span.of_row(length)
    allowed = _all_pairs(span, device).tril(span.offset)
    if window is not None and window < length:
        allowed = allowed.triu(span.offset + 1 - window)
    if positions is not None:
        documents = (positions == 0).cumsum(1)
        queries, keys = span.of_queries(documents), span.of_keys(documents)
        allowed = allowed & (queries[:, None, :, None] == keys[:, None, None, :])
    if key_mask is not None:
        allowed = allowed & span.of_keys(key_mask).bool()[:, None, None, :]
    return allowed


def allowed_keys_on_both_sides(
    length: int, window: int | None, key_mask: Tensor | None, device: torch.device, span: Span | None = None
) -> Tensor | None:
    """Return the mask of the keys that each query sees without causality, (B or 1, 1, S or 1, S) bool; None = all.

    With a key mask and a window a query may see none; see `without_blind_rows`. A `span` cuts the mask to some queries
    and keys.
    """
    if key_mask is not None and span is not None:
        key_mask = span.of_keys(key_mask)
    allowed = key_mask.bool()[:, None, None, :] if key_mask is not None else None
    if window is None or window >= length:
        return allowed
    span = span or Span.of_row(length)
    near = _all_pairs(span, device).triu(span.offset + 1 - window).tril(span.offset + window - 1)
    return near if allowed is None else near & allowed


def _all_pairs(span: Span, device: torch.device) -> Tensor:
    return torch.ones(len(span.queries), len(span.keys), dtype=torch.bool, device=device)[None, None]


def without_blind_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Let the queries that see no key see all, and return where they are, for their output to become zero.

    Zero is torch's own result of a softmax over nothing, but some kernels return NaN, and keys and values carry it to
    other queries.

    Args:
        mask: (B, 1, S or 1, C) bool, the keys that each query sees.

    Returns:
        a mask of the same shape without such a query; (B, 1, S or 1, 1), True where one was.
    """
    blind = ~mask.any(-1, keepdim=True)
    return mask | blind, blind
