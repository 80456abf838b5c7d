"""Blocks of scores: queries of this rank with keys of one rank of the ring, and which pairs of them count.

The positions of a rank are ascending runs of consecutive ones, and two ranks have none in common. So causality is
plain for two runs: every pair counts, none does, or they are the same run. With the runs of zigzag order
(`parallel.context`) three kinds of blocks are left, none of which needs a mask: a rank's own keys are one causal block,
since both sides have the same order; all queries see the first chunk of an earlier rank; and the second chunk of
queries sees all keys of a later rank.

Documents need masks. As their tokens are consecutive, a query sees an interval of the keys of a block, and a block is
cut into tiles of queries, for which most keys are left out on a host that can read the intervals. A kernel for packed
documents needs neither: it is given how many tokens of each document are among the queries, and among the keys.

Dim legend: B batch, N query heads, S positions of the full row, T queries and C keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.documents import cumulative_lengths
from megatron_ds.layers.kernels.reference import AttentionCall
from megatron_ds.layers.values import has_values
from megatron_ds.parallel.context import Runs, as_index

_TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements of the scores or of the mask of a tile, by device type."""
_LEAST_ROWS, _MOST_ROWS = 16, {"cpu": 256, "cuda": 4096}
"""Queries of a tile; on a CPU they are few, so that a tile is of few documents."""


@dataclass(frozen=True)
class Block:
    """Queries and keys, and what is added to their scores.

    Attributes:
        queries, keys: rows of this rank's queries, and of the keys of the other rank.
        causal: the rows have the same positions, and a query sees no later key. Else it sees all that `limits` and
            `key_term` leave.
        limits: (B or 1, T) int64 twice: a query sees the keys of the block from the first number up to the second;
            None = all.
        key_term: (B or 1, N or 1, 1, C) in fp32 or more, added to the scores: biases, and -inf at keys that are masked.
        seen: (B or 1, T) bool, the queries that see a key of the block; None = all do, or the kernel finds out.
        segments: where documents begin among the queries of all rows, and among the keys, (B * documents,) int32 twice,
            as `cumulative_lengths` has it; a document may have no token there. None = the kernel does not ask for them.
        distances: the part of `AttentionCall.distance_bias` that the block reads, which is (N, T + C - 1): that of the
            first key and the last query first.
    """

    queries: slice
    keys: slice
    causal: bool = False
    limits: tuple[Tensor, Tensor] | None = None
    key_term: Tensor | None = None
    seen: Tensor | None = None
    segments: tuple[Tensor, Tensor] | None = None
    distances: slice | None = None

    def inside(self, limits: tuple[Tensor, Tensor]) -> Tensor:
        """Return the pairs that count by limits, (B or 1, 1, T, C) bool."""
        low, high = (limit[:, None, :, None] for limit in limits)
        keys = torch.arange(_length(self.keys), device=low.device)
        return (low <= keys) & (keys < high)


class Form(Enum):
    """Blocks as a kernel needs them."""

    WHOLE = auto()
    """Blocks as large as can be, and tiles of queries only for documents."""
    TILES = auto()
    """Tiles of queries, as the kernel keeps all scores; it finds by itself which queries see no key."""
    SEGMENTS = auto()
    """Blocks as large as can be, with the segments of documents."""


@dataclass(frozen=True)
class RowBlocks:
    """The blocks of this rank's queries with the keys of each rank of the ring.

    Attributes:
        call: options of attention over full rows; without a window or dropout.
        queries: positions of this rank's queries.
        batch, heads: B, N.
        device: of the queries.
        form: what the kernel needs.
    """

    call: AttentionCall
    queries: Runs
    batch: int
    heads: int
    device: torch.device
    form: Form

    def with_keys(self, keys: Runs) -> Iterator[Block]:
        """Yield the blocks of all queries with the keys of one rank.

        Args:
            keys: positions of these keys.
        """
        call = self.call
        key_mask = None if call.key_mask is None else self._of(call.key_mask, keys).bool()
        term = None
        if call.key_bias is not None:
            bias = self._of(call.key_bias, keys)[:, :, None]
            term = bias.to(torch.promote_types(bias.dtype, torch.float32))
        if key_mask is not None:
            hidden = ~key_mask[:, None, None]
            zero = torch.zeros((), device=self.device) if term is None else term
            term = torch.where(hidden, -torch.inf, zero)
        documents = None
        if call.positions is not None and self.form is not Form.SEGMENTS:
            by_position = (call.positions == 0).cumsum(1)
            documents = self._of(by_position, self.queries), self._of(by_position, keys)
        for block in visible_blocks(self.queries, keys, call.causal, fused=call.distance_bias is None):
            if self.form is Form.SEGMENTS:
                segments = self._segments(block.queries, self.queries), self._segments(block.keys, keys)
                yield replace(block, segments=segments)
                continue
            if self.form is Form.WHOLE and documents is None:
                yield self._masked(block, term, key_mask)
                continue
            limits = _limits(block, documents, self.device)
            for tile in self._tiles(block, limits):
                yield self._masked(self._placed(tile, keys), term, key_mask)

    def _of(self, x: Tensor, runs: Runs) -> Tensor:
        return x[..., as_index(runs, self.device)]

    def _masked(self, block: Block, term: Tensor | None, key_mask: Tensor | None) -> Block:
        """Add the terms of keys, and find the queries that see none."""
        has_blind = key_mask is not None or block.limits is not None
        seen = _sees_any(block, key_mask, self.device) if has_blind and self.form is Form.WHOLE else None
        return replace(block, key_term=None if term is None else term[..., block.keys], seen=seen)

    def _tiles(self, block: Block, limits: tuple[Tensor, Tensor] | None) -> Iterator[Block]:
        """Cut a block into tiles of queries, without the keys that none of a tile sees, as far as the host knows."""
        num_queries, num_keys = _length(block.queries), _length(block.keys)
        kind = "cpu" if self.device.type == "cpu" else "cuda"
        heads = self.heads if self.form is Form.TILES or self.call.key_bias is not None else 1
        by_memory = _TILE_ELEMENTS[kind] // (self.batch * heads * num_keys)
        rows = min(max(by_memory, _LEAST_ROWS), _MOST_ROWS[kind])
        for begin in range(0, num_queries, rows):
            end = min(begin + rows, num_queries)
            first, last, part = 0, end if block.causal else num_keys, None
            if limits is not None:
                low, high = (limit[:, begin:end] for limit in limits)
                if kind == "cpu" and has_values():
                    sees = low < high
                    if not bool(sees.any()):
                        continue
                    first, last = int(low[sees].min()), int(high[sees].max())
                part = low - first, high - first
            queries = slice(block.queries.start + begin, block.queries.start + end)
            yield Block(queries, slice(block.keys.start + first, block.keys.start + last), limits=part)

    def _placed(self, block: Block, keys: Runs) -> Block:
        """Add the part of the biases by distance."""
        if self.call.distance_bias is None:
            return block
        zero = self.call.distance_bias.shape[-1] // 2
        first_key, last_key = (_position(keys, row) for row in (block.keys.start, block.keys.stop - 1))
        first, last = (_position(self.queries, row) for row in (block.queries.start, block.queries.stop - 1))
        distances = slice(zero + first_key - last, zero + last_key - first + 1)
        return replace(block, distances=distances)

    def _segments(self, rows: slice, runs: Runs) -> Tensor:
        """Return where documents begin among some rows of runs, for all rows of the batch."""
        assert self.call.bounds is not None
        counts, begin = torch.zeros_like(self.call.bounds), 0
        for run in runs:  # of each, the number of positions before each document
            part = run[max(rows.start - begin, 0) : max(rows.stop - begin, 0)]
            counts += (self.call.bounds - part.start).clamp(0, len(part))
            begin += len(run)
        return cumulative_lengths(self.batch, _length(rows), counts, self.device)


def visible_blocks(queries: Runs, keys: Runs, causal: bool, fused: bool = True) -> list[Block]:
    """Return the pairs of runs that see one another, as blocks.

    Args:
        queries, keys: ascending positions; with causality two runs of them are equal or have no position in common.
        causal: a query sees no later key.
        fused: join blocks whose rows are neighbours; else each block is of consecutive positions on both sides.
    """
    if causal and fused and queries == keys:
        everything = slice(0, sum(map(len, queries)))
        return [Block(everything, everything, causal=True)]
    found: list[Block] = []
    for run, rows in zip(queries, _rows(queries)):
        pairs = list(zip(keys, _rows(keys)))
        earlier = [columns for other, columns in pairs if not causal or other.stop <= run.start]
        same = [columns for other, columns in pairs if causal and other == run]
        later = [other for other, _ in pairs if causal and other.start >= run.stop]
        assert len(earlier) + len(same) + len(later) == len(keys), (queries, keys)
        if earlier and fused:
            _add_or_join(found, Block(rows, slice(0, earlier[-1].stop)))
        else:
            found += [Block(rows, columns) for columns in earlier]
        found += [Block(rows, columns, causal=True) for columns in same]
    return found


def _add_or_join(blocks: list[Block], block: Block) -> None:
    """Add a block, or join it with the last one if they are neighbours and see the same keys."""
    last = blocks[-1] if blocks else None
    if last is not None and not last.causal and last.keys == block.keys and last.queries.stop == block.queries.start:
        blocks[-1] = Block(slice(last.queries.start, block.queries.stop), block.keys)
    else:
        blocks.append(block)


def _rows(runs: Runs) -> list[slice]:
    """Return the rows of each run in a tensor of all of them."""
    found, begin = [], 0
    for run in runs:
        found.append(slice(begin, begin + len(run)))
        begin += len(run)
    return found


def _position(runs: Runs, row: int) -> int:
    """Return the position of a row in a tensor of all runs."""
    for run in runs:
        if row < len(run):
            return run[row]
        row -= len(run)
    raise AssertionError((runs, row))


def _length(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _limits(
    block: Block, documents: tuple[Tensor, Tensor] | None, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Return the keys of a block that each query sees by documents and causality, (B or 1, T) twice; None = all."""
    num_keys = _length(block.keys)
    after = torch.arange(1, num_keys + 1, device=device)[None]
    if documents is None:
        return (torch.zeros_like(after), after) if block.causal else None
    of_queries, of_keys = documents[0][:, block.queries].contiguous(), documents[1][:, block.keys].contiguous()
    low = torch.searchsorted(of_keys, of_queries)
    high = torch.searchsorted(of_keys, of_queries, right=True)
    return low, torch.minimum(high, after) if block.causal else high


def _sees_any(block: Block, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Return which queries of a block see a key, (B or 1, T) bool."""
    num_queries, num_keys = _length(block.queries), _length(block.keys)
    if block.limits is not None:
        low, high = block.limits
    else:
        low = torch.zeros(1, num_queries, dtype=torch.int64, device=device)
        high = torch.arange(1, num_queries + 1, device=device)[None] if block.causal else low + num_keys
    if key_mask is None:
        return low < high
    before = F.pad(key_mask[:, block.keys].cumsum(1), (1, 0))  # the number of keys to see before each, and in all
    low, high = (limit.clamp(0, num_keys).expand(len(before), -1) for limit in (low, high))
    return (low < high) & (before.gather(1, high) > before.gather(1, low))
