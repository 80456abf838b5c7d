"""Sizes of launches: how many elements a program holds, by how many warps.

All kernels here are bound by memory, so the rule is one for all of them: a thread holds 8 to 32 elements of each
operand, enough loads in flight to hide the latency of memory, and few enough for its 255 registers. Nothing is tuned at
run time, which would make the first step slow and, for sums, results depend on the machine's load.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError

MAX_ROW = 16384
"""Longest row that one program holds in registers."""


@dataclass(frozen=True)
class RowTile:
    """Rows that a program holds in full.

    Attributes:
        rows: number of rows.
        block: the row's length, rounded up to a power of two.
        num_warps: warps per program.
    """

    rows: int
    block: int
    num_warps: int


@cache
def row_tile(size: int) -> RowTile:
    """Return the tile for rows of `size` elements: several short rows, as heads are, or one long one.

    Raises:
        ConfigError: the row is longer than `MAX_ROW`.
    """
    if size > MAX_ROW:
        raise ConfigError(f"train.kernels: a hidden size of {size} is longer than a Triton norm's {MAX_ROW}; try torch")
    block = max(16, 1 << (size - 1).bit_length())
    rows = max(1, 2048 // block)
    return RowTile(rows, block, num_warps=min(16, max(4, rows * block // 512)))


@cache
def num_programs(device: torch.device, tile: RowTile) -> int:
    """Return how many programs loop over all rows, each over its share: what fits 16 warps of a multiprocessor.

    At least two per multiprocessor, of which one loads while the other computes. Each costs a row of partial sums.
    """
    if device.type != "cuda":
        return 3  # in the interpreter
    return max(2, 16 // tile.num_warps) * torch.cuda.get_device_properties(device).multi_processor_count


def as_rows(x: Tensor) -> Tensor:
    """Return (..., size) as (rows, size) with the elements of a row side by side; a copy only where there must be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
