"""Keys and values that a rank's queries see, fetched from the ranks that hold them (as in Llama 3; Dubey et al. 2024).

With causality no later keys are fetched, and with a window none beyond it. One all-to-all moves the rows of keys and
values; backward their gradients return the same way and are summed in fp32. The layer then has ordinary rows of keys:
every mask, bias and kernel works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.parallel.constants import kept
from megatron_ds.parallel.context import Runs, index_of_runs
from megatron_ds.parallel.grid import Axis


@dataclass(frozen=True)
class FetchPlan:
    """The rows that a rank sends and gets.

    Attributes:
        sent: its rows, as indices, by the rank that gets them.
        num_sent, num_received: number of rows to and from each rank.
        places: index of each received row among all of them in order of their positions.
        fetched: the positions of all of them.
    """

    sent: Tensor
    num_sent: tuple[int, ...]
    num_received: tuple[int, ...]
    places: Tensor
    fetched: Runs

    def slice_of(self, keys: range) -> slice:
        """Return where consecutive positions are among the fetched ones."""
        begin = 0
        for run in self.fetched:
            if run.start <= keys.start and keys.stop <= run.stop:
                return slice(begin + keys.start - run.start, begin + keys.stop - run.start)
            begin += len(run)
        raise AssertionError((keys, self.fetched))


def union(ranges: Sequence[range]) -> Runs:
    """Return the positions of ranges, each once and in order."""
    found: list[range] = []
    for one in sorted(ranges, key=lambda one: one.start):
        if found and one.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, one.stop))
        else:
            found.append(one)
    return tuple(found)


@kept(maxsize=64)  # of the last lengths, by the few kinds of layers
def plan_fetch(held: tuple[Runs, ...], wanted: tuple[Runs, ...], rank: int, device: torch.device) -> FetchPlan:
    """Return the plan of a rank. All ranks have the same arguments but for the last two.

    Args:
        held: the positions of the keys of each rank.
        wanted: the positions that each rank needs, from `union`.
        rank: index of the rank.
        device: the device of the indices.
    """
    host = torch.device("cpu")
    held_by = [index_of_runs(runs, host) for runs in held]
    length = sum(map(len, held_by))
    to_each = [_marks(runs, length)[held_by[rank]].nonzero().flatten() for runs in wanted]
    is_wanted = _marks(wanted[rank], length)
    from_each = [positions[is_wanted[positions]] for positions in held_by]
    places = torch.searchsorted(index_of_runs(wanted[rank], host), torch.cat(from_each))
    return FetchPlan(
        torch.cat(to_each).to(device),
        tuple(map(len, to_each)),
        tuple(map(len, from_each)),
        places.to(device),
        wanted[rank],
    )


def _marks(runs: Runs, length: int) -> Tensor:
    """Return which positions of a row are in runs, (length,) bool."""
    marks = torch.zeros(length, dtype=torch.bool)
    for run in runs:
        marks[run.start : run.stop] = True
    return marks


@torch.compiler.disable
def fetch(k: Tensor, v: Tensor, plan: FetchPlan, axis: Axis) -> tuple[Tensor, Tensor]:
    """Fetch the keys and values of a plan: (s, B, K, D) each -> (fetched, B, K, D) each, in order of their positions.

    Forward and backward: one all-to-all over the axis, of the rows that are for other ranks.
    """
    k, v = _Fetch.apply(torch.stack([k, v], dim=2), plan, axis).unbind(2)
    return k, v


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: FetchPlan, axis: Axis) -> Tensor:
        ctx.plan, ctx.axis, ctx.count = plan, axis, len(rows)
        received = _exchanged(rows.index_select(0, plan.sent), plan.num_sent, plan.num_received, axis)
        return torch.empty_like(received).index_copy_(0, plan.places, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        plan = ctx.plan
        returned = grads[0].index_select(0, plan.places)
        received = _exchanged(returned, plan.num_received, plan.num_sent, ctx.axis)
        total = received.new_zeros((ctx.count, *received.shape[1:]), dtype=torch.float32)
        return total.index_add_(0, plan.sent, received.float()).to(received.dtype), None, None


def _exchanged(rows: Tensor, num_sent: Sequence[int], num_received: Sequence[int], axis: Axis) -> Tensor:
    received = rows.new_empty((sum(num_received), *rows.shape[1:]))
    dist.all_to_all_single(received, rows, list(num_received), list(num_sent), group=axis.group)
    return received
