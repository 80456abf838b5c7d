"""All-gather and reduce-scatter along dim 0 on CPU, by one message between every two ranks.

To scatter a sum, gloo reduces a copy of the full tensor on every rank, and it gathers in a thread of its own. Messages
move a ring's bytes, n(t-1)/t per rank for a full tensor of n bytes, directly into the result. On two ranks and 4 MiB,
a reduce-scatter takes 0.9 ms instead of 2.3 ms, and an all-gather 0.9 ms instead of 1.3 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.parallel.grid import Axis


@dataclass(frozen=True)
class Messages:
    """Messages under way.

    Attributes:
        works: the sends and receives.
        finish: called when all have arrived.
    """

    works: Sequence[dist.Work]
    finish: Callable[[], None] | None = None

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        if self.finish is not None:
            self.finish()


def place_of(x: Tensor) -> tuple[int, int]:
    """Return where a tensor begins: its storage, and the offset in it. Tensors without values have a place too."""
    return x.untyped_storage()._cdata, int(x.storage_offset())


def begin_gather(x: Tensor, axis: Axis, out: Tensor | None = None) -> tuple[Tensor, Messages]:
    """Start a gather: (S/t, ...) -> (S, ...). Wait for the messages before reading the result.

    Args:
        x: this rank's part.
        axis: the ranks that exchange their parts.
        out: contiguous memory of the result, of which x may be the part; None = new memory.
    """
    own = x.contiguous()
    if out is None:
        out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    parts = out.chunk(axis.size)
    works = _exchange([own] * axis.size, parts, axis)
    if place_of(parts[axis.rank]) != place_of(own):
        parts[axis.rank].copy_(own)
    return out, Messages(works)


def begin_reduce_scatter(x: Tensor, axis: Axis, out: Tensor | None = None) -> tuple[Tensor, Messages]:
    """Start a sum and scatter: (S, ...) -> (S/t, ...). Wait for the messages before reading the result.

    Args:
        x: this rank's summand.
        axis: the ranks that exchange their summands.
        out: memory of the result, which may be this rank's part of a contiguous x; None = new memory.
    """
    given = x.contiguous().chunk(axis.size)
    own = given[axis.rank]
    received = [own if rank == axis.rank else torch.empty_like(part) for rank, part in enumerate(given)]
    others = [part for rank, part in enumerate(received) if rank != axis.rank]
    total = out if out is not None else others[0]

    def add() -> None:
        torch.add(own, others[0], out=total)
        for part in others[1:]:
            total.add_(part)

    return total, Messages(_exchange(given, received, axis), add)


def _exchange(given: Sequence[Tensor], received: Sequence[Tensor], axis: Axis) -> list[dist.Work]:
    """Start to send `given` to the rank of each index, and to receive into `received`; nothing to this rank itself."""
    others = [(index, rank) for index, rank in enumerate(axis.ranks) if index != axis.rank]
    receives = [dist.irecv(received[index], rank, group=axis.group) for index, rank in others]
    sends = [dist.isend(given[index], rank, group=axis.group) for index, rank in others]
    return [work for work in (*receives, *sends) if work is not None]
