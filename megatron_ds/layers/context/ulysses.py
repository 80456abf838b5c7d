"""Exchange of a part of the sequence for a part of the heads, around attention (Ulysses; Jacobs et al. 2023).

Shapes: s = S/c positions of a rank, u ranks that exchange, n = N/t query heads of a tensor rank, D head dim. One
all-to-all carries queries, keys and values, a second one the output; backward they run the other way. A rank sends, in
elements, s B D (2 n + 2 m u) (u - 1)/u forward and the same backward, where m is the number of key heads that a rank
gets: their share of the n/u query heads. Keys that several ranks need are sent to each, and their gradients summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.parallel.constants import kept
from megatron_ds.parallel.grid import Axis


@dataclass(frozen=True)
class HeadExchange:
    """The heads that each of the ranks gets.

    Attributes:
        axis: the ranks.
        held: query heads of this tensor rank, as indices in the full model; u divides their number.
        kv_of_held: for each of them the local index of the key head that it reads.
    """

    axis: Axis
    held: range
    kv_of_held: tuple[int, ...]

    @property
    def share(self) -> slice:
        """The part of the tensor rank's query heads whose attention this rank computes."""
        size = len(self.held) // self.axis.size
        return slice(self.axis.rank * size, (self.axis.rank + 1) * size)

    @property
    def heads(self) -> range:
        """The query heads whose attention this rank computes, as indices in the full model."""
        return self.held[self.share]

    @cached_property
    def _wanted(self) -> list[list[int]]:
        """The local indices of the key heads that each rank gets, as many for each."""
        size = len(self.held) // self.axis.size
        parts = [self.kv_of_held[start : start + size] for start in range(0, len(self.held), size)]
        wanted = [sorted(set(part)) for part in parts]
        most = max(map(len, wanted))
        return [one + one[-1:] * (most - len(one)) for one in wanted]  # what fills up is read by no query head

    @cached_property
    def sent(self) -> tuple[int, ...]:
        """Local indices of the key heads in the order in which they are sent."""
        return tuple(head for one in self._wanted for head in one)

    @cached_property
    def kv_of_head(self) -> tuple[int, ...]:
        """The index of the key head that each of `heads` reads, among those that this rank gets."""
        if self.axis.size == 1:
            return self.kv_of_held
        wanted = self._wanted[self.axis.rank]
        return tuple(wanted.index(head) for head in self.kv_of_held[self.share])

    def enter(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange positions for heads: q (s, B, n, D) -> (su, B, n/u, D), k and v (s', B, heads, D) -> (s'u, B, m, D).

        Forward and backward: one all-to-all, or two if keys are of other positions than queries.
        """
        if self.axis.size == 1:
            return q, k, v
        if self.sent != tuple(range(k.shape[2])):
            index = _index(self.sent, k.device)
            k, v = k.index_select(2, index), v.index_select(2, index)
        if len(q) == len(k):
            q, k, v = to_heads((q, k, v), self.axis)
        else:
            (q,), (k, v) = to_heads((q,), self.axis), to_heads((k, v), self.axis)
        return q, k, v

    def leave(self, y: Tensor) -> Tensor:
        """Exchange heads for positions: (su, B, n/u * D) -> (s, B, n * D). Forward and backward: one all-to-all."""
        return to_positions(y, self.axis) if self.axis.size > 1 else y


@kept(maxsize=None)
def _index(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Return an index on a device; made once, because a copy to a GPU makes the host wait."""
    return torch.tensor(indices, device=device)


@torch.compiler.disable
def to_heads(parts: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """Exchange positions for heads in one all-to-all: (s, B, n_i, D) each -> (su, B, n_i/u, D) each."""
    return _ToHeads.apply(axis, *parts)


@torch.compiler.disable
def to_positions(y: Tensor, axis: Axis) -> Tensor:
    """Exchange heads for positions: (su, B, W) -> (s, B, uW), the parts of the ranks in order."""
    return _ToPositions.apply(axis, y)


def _send_heads(parts: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """Send to each rank its heads of this rank's positions; the results are parts of one buffer."""
    size, batch, dim = axis.size, parts[0].shape[1], parts[0].shape[3]
    widths = [part.shape[2] // size for part in parts]
    buffer = parts[0].new_empty(size, len(parts[0]), batch, sum(widths), dim)
    for part, into in zip(parts, buffer.split(widths, dim=3)):
        into.copy_(part.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4))
    received = torch.empty_like(buffer)
    dist.all_to_all_single(received, buffer, group=axis.group)
    return received.flatten(0, 1).split(widths, dim=2)


def _send_positions(parts: Sequence[Tensor], axis: Axis) -> tuple[Tensor, ...]:
    """Send to each rank its positions of this rank's heads: the inverse of `_send_heads`."""
    widths = [part.shape[2] for part in parts]
    length, batch, _, dim = parts[0].shape
    buffer = parts[0].new_empty(length, batch, sum(widths), dim)
    for part, into in zip(parts, buffer.split(widths, dim=2)):
        into.copy_(part)
    received = buffer.new_empty(axis.size, length // axis.size, *buffer.shape[1:])
    dist.all_to_all_single(received, buffer, group=axis.group)
    return tuple(part.permute(1, 2, 0, 3, 4).flatten(2, 3) for part in received.split(widths, dim=3))


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        return _send_heads(parts, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_send_positions(grads, ctx.axis)


class _ToPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, y: Tensor) -> Tensor:
        ctx.axis = axis
        return _send_positions((y.unsqueeze(2),), axis)[0].flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, _send_heads((grads[0].unflatten(2, (ctx.axis.size, -1)),), ctx.axis)[0].squeeze(2)
