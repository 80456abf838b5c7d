"""Documents that share a row: where each begins, found on the host once a step.

Kernels for documents of variable length read bounds in a tensor whose shape the host must know. Found on a GPU, they
would make the host wait for it in every layer of every micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.columns import DOCUMENT_BOUNDS, POSITION_IDS

Batch = Mapping[str, Tensor]


@dataclass(eq=False)
class DocumentLimit:
    """Bound of the length of documents in the running step: set by a rank's engine, read by its layers.

    Attributes:
        longest: positions, a power of two, or the length of the rows; None = the length of the rows.
    """

    longest: int | None = None


def with_document_bounds(batches: Sequence[Batch], limit: DocumentLimit) -> Sequence[Batch]:
    """Add `document_bounds` to micro-batches that have `position_ids`, with one shape for all of them.

    It is (B, D + 1) int32: in each row the positions where documents begin, then S until the row is full. D is the
    number of documents in the row that has most of them, rounded up to a power of two, so that the shape seldom changes
    from step to step.

    Args:
        batches: all micro-batches of a step, on the host. Each pipeline stage derives the same from them.
        limit: is set to the longest document in them.
    """
    limit.longest = None
    if not batches or POSITION_IDS.name not in batches[0]:
        return batches
    begins = [_begins(batch[POSITION_IDS.name]) for batch in batches]
    width = _power_of_two(max(int(one.sum(1).max()) for one in begins))
    found, longest = [], 1
    for batch, one in zip(batches, begins):
        bounds = _bounds(one, width)
        longest = max(longest, int(bounds.diff().max()))
        is_pinned = batch[POSITION_IDS.name].is_pinned()
        found.append({**batch, DOCUMENT_BOUNDS: bounds.pin_memory() if is_pinned else bounds})
    limit.longest = min(_power_of_two(longest), max(one.shape[1] for one in begins))
    return found


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _begins(positions: Tensor) -> Tensor:
    """Return where a document begins, (B, S) bool on the host; the first position of a row begins one."""
    begins = positions.cpu() == 0
    begins[:, 0] = True
    return begins


def _bounds(begins: Tensor, width: int) -> Tensor:
    """Return the bounds of (B, S) bool, (B, width + 1) int32."""
    rows, places = begins.nonzero(as_tuple=True)
    counts = begins.sum(1)
    before = counts.cumsum(0) - counts
    bounds = torch.full((len(begins), width + 1), begins.shape[1], dtype=torch.int32)
    bounds[rows, torch.arange(len(rows)) - before[rows]] = places.to(torch.int32)
    return bounds


def cumulative_lengths(batch: int, length: int, bounds: Tensor | None, device: torch.device) -> Tensor:
    """Return where documents begin among the B * S tokens of rows in order, and B * S at the end, int32.

    Neighbouring entries may be equal: documents without a token, which kernels pass over. The host does not wait.

    Args:
        batch, length: B, S.
        bounds: (B, D + 1) as `with_document_bounds` makes them; None = one document per row.
        device: the device of the result.
    """
    rows = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    return rows if bounds is None else (bounds + rows[:-1, None]).flatten()


def document_starts(positions: Tensor) -> Tensor:
    """Return the position where the document of each position begins, (B, S) int32; (B, S), 0 where one begins."""
    places = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
    return torch.where(positions == 0, places, 0).cummax(1).values
