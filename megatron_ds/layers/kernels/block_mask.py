"""Masks of FlexAttention by blocks of 128 positions, in closed form (Dong et al. 2024, "Flex Attention").

The keys that a query of causal attention sees are a range: from the start of its document, or of its window, to the
query. So the key blocks that a query block sees are a range too, and nothing of size (S, S) is needed to find it. The
blocks that are seen in part come first in their lists, the diagonal last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128


class Blocks(NamedTuple):
    """The tensors of a `BlockMask`, int32: numbers of blocks (B or 1, 1, n) and indices (B or 1, 1, n, n), n = S / 128.

    The key blocks of a query block, those seen in part and those seen in full; then the query blocks of a key block.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def first_visible(length: int, starts: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """Return the first key that each query of causal attention sees, (B or 1, S) int32, which never decreases.

    Args:
        length: S.
        starts: (B, S), where the document of each query begins; None = at 0.
        window: the number of last keys that a query sees; None = all.
        device: the device of the result.
    """
    places = torch.arange(length, dtype=torch.int32, device=device)[None]
    first = torch.zeros_like(places) if starts is None else starts
    return first if window is None else torch.maximum(first, places - (window - 1))


def causal_blocks(first: Tensor, is_partial: bool) -> Blocks:
    """Return the blocks of causal attention, where query q sees keys from `first[:, q]` to q.

    Args:
        first: (B or 1, S) int32, which never decreases.
        is_partial: no block is seen in full, because some of its keys are masked.
    """
    length = first.shape[1]
    count = -(-length // BLOCK)
    block = torch.arange(count, dtype=torch.int32, device=first.device)
    lowest = first[:, ::BLOCK] // BLOCK  # of the first query of a block
    highest = first[:, (block * BLOCK + BLOCK - 1).clamp(max=length - 1)]  # of its last query
    full = (-(-highest // BLOCK)).minimum(block)  # the first block that all its queries see in full
    if is_partial:
        full = block.expand_as(full)
    # the lists of keys: lowest .. full - 1 and the diagonal in part, full .. diagonal - 1 in full
    keys = _run_and_diagonal(lowest, full - lowest, block)
    full_keys = _run(full, count)
    # query block i sees key block j in part or full if lowest[i] <= j, in full if full[i] <= j < i
    last = (lowest[:, None, :] <= block[:, None]).sum(-1, dtype=torch.int32)
    last_full = (full[:, None, :] <= block[:, None]).sum(-1, dtype=torch.int32).maximum(block + 1)
    queries = _diagonal_and_run(last_full, block)
    full_queries = _run((block + 1).expand_as(last), count)
    parts = (
        *(full - lowest + 1, keys, block - full, full_keys),
        *(last - last_full + 1, queries, last_full - block - 1, full_queries),
    )
    return Blocks(*(part[:, None].to(torch.int32).contiguous() for part in parts))


def all_blocks(length: int, device: torch.device) -> Blocks:
    """Return all blocks, each seen in part: attention to all keys, some of which may be masked."""
    count = -(-length // BLOCK)
    number = torch.full((1, 1, count), count, dtype=torch.int32, device=device)
    indices = torch.arange(count, dtype=torch.int32, device=device).expand(1, 1, count, count).contiguous()
    none = torch.zeros_like(number)
    return Blocks(number, indices, none, indices, number, indices, none, indices)


def near_blocks(length: int, window: int, device: torch.device) -> Blocks:
    """Return the blocks with keys less than `window` from a query, on both sides, each seen in part."""
    count = -(-length // BLOCK)
    reach = (window - 1 + BLOCK - 1) // BLOCK  # blocks whose nearest position is less than `window` away
    block = torch.arange(count, dtype=torch.int32, device=device)
    first, last = (block - reach).clamp(min=0), (block + reach).clamp(max=count - 1)
    number = (last - first + 1)[None, None].contiguous()
    indices = _run(first[None], count)[None].contiguous()
    none = torch.zeros_like(number)
    return Blocks(number, indices, none, indices, number, indices, none, indices)


def _run(first: Tensor, count: int) -> Tensor:
    """Return first, first + 1, ... of each (B, n): (B, n, count), indices that exist."""
    steps = torch.arange(count, dtype=torch.int32, device=first.device)
    return (first[..., None] + steps).clamp(max=count - 1)


def _run_and_diagonal(first: Tensor, number: Tensor, block: Tensor) -> Tensor:
    """Return `number` indices from `first` on, and then the diagonal: (B, n, n)."""
    run = _run(first, len(block))
    return torch.where(block < number[..., None], run, block[:, None])


def _diagonal_and_run(first: Tensor, block: Tensor) -> Tensor:
    """Return the diagonal, and then the indices from `first` on: (B, n, n)."""
    run = _run(first - 1, len(block))
    return torch.where(block == 0, block[:, None], run)
