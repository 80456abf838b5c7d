"""Groups of rows in few sizes, for products on a CPU.

oneDNN generates code for every shape of a product. That takes milliseconds, and up to a thousand shapes are kept, which
take about a megabyte each. The number of tokens that choose an expert is different in every step, so the rows of each
expert are padded with zeros to one of a few sizes: at most 12.5 % more rows, or 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ds.layers.moe.grouped import Groups

DEVICES = ("cpu",)
"""Device types on which rows are padded."""

_SMALLEST_STEP = 16


def padded_size(size: int) -> int:
    """Return the next size that groups are padded to: a multiple of 16, and of an eighth of a power of two below."""
    step = max(_SMALLEST_STEP, 2 ** max(size.bit_length() - 4, 0))
    return -(-size // step) * step


@dataclass(frozen=True)
class Padding:
    """Groups of rows with zeros after each.

    Attributes:
        groups: the groups, with their padding.
        places: (rows,) int64, the index of each row among the padded ones.
    """

    groups: Groups
    places: Tensor

    @classmethod
    def of(cls, groups: Groups) -> Padding:
        """Return the padding of groups in host memory."""
        sizes = [padded_size(size) for size in groups.sizes]
        padded = torch.tensor(sizes, dtype=torch.int64)
        shifts = (padded - groups.counts).cumsum(0).roll(1)
        shifts[:1] = 0
        count = sum(groups.sizes)
        places = torch.arange(count) + shifts.repeat_interleave(groups.counts, output_size=count)
        return cls(Groups(padded, sizes), places)

    def add(self, rows: Tensor) -> Tensor:
        """Insert the padding: (rows, H) -> (padded rows, H)."""
        return _Insert.apply(rows, self.places, sum(self.groups.sizes))

    def remove(self, padded: Tensor) -> Tensor:
        """Leave the padding out: (padded rows, H) -> (rows, H)."""
        return _LeaveOut.apply(padded, self.places)


def _inserted(rows: Tensor, places: Tensor, count: int) -> Tensor:
    return rows.new_zeros((count, *rows.shape[1:])).index_copy_(0, places, rows)


class _Insert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return _inserted(rows, places, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grads[0].index_select(0, places), None, None


class _LeaveOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(padded)
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _inserted(grads[0], places, ctx.count), None
