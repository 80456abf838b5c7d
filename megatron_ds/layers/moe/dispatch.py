"""The exchange of tokens with the ranks that have their experts, without a bound on how many an expert gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ds.layers.moe.grouped import Groups
from megatron_ds.layers.values import has_values
from megatron_ds.parallel.collectives import exchange_counts, exchange_rows
from megatron_ds.parallel.grid import Axis


class _Permute(torch.autograd.Function):
    """Rows in another order. Both directions gather rows, so that sums have one order: atomics would have any."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Copies(torch.autograd.Function):
    """k copies of each row, sorted by expert: (T, H) -> (T k, H). Backward: the sum of a row's copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape = len(x), top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse).unflatten(0, ctx.shape).sum(1), None, None, None


def count_per_expert(ids: Tensor, num_experts: int) -> Tensor:
    """Count the tokens of each expert in a sorted list of experts, (n,) -> (E,) int64, without atomics or a wait."""
    ends = torch.searchsorted(ids, torch.arange(num_experts, device=ids.device), right=True)
    return ends.diff(prepend=ends.new_zeros(1))


def even_parts(count: int, num_parts: int) -> list[int]:
    """Return the sizes of parts that are as equal as they can be, the larger ones first."""
    size, larger = divmod(count, num_parts)
    return [size + (part < larger) for part in range(num_parts)]


def _even_numbers(of_experts: Sequence[int], axis: Axis) -> list[int]:
    """Return the rows to each rank, those from each rank, and those of each of this rank's experts.

    Args:
        of_experts: rows of each of all experts that a rank has.
        axis: the ranks that divide the experts.
    """
    local = len(of_experts) // axis.size
    by_rank = [of_experts[begin : begin + local] for begin in range(0, len(of_experts), local)]
    own = by_rank[axis.rank]
    return [*map(sum, by_rank), *[sum(own)] * axis.size, *(count * axis.size for count in own)]


class Dispatch:
    """The way of one rank's tokens to their experts and back, for one micro-batch.

    Expert n is on rank n // (E / e) of the expert ranks. The rows of `send` are sorted by expert, those of an expert by
    the rank that they come from, and there by token: the order is the same in every run.

    If e > 1, the host waits for the number of rows that ranks exchange. Otherwise it does not wait. Where tensors have
    no values, it takes it that all experts are chosen alike.

    Args:
        chosen: (T, k) int64, the experts of each of this rank's tokens.
        num_experts: E.
        axis: the e ranks that divide the experts; e divides E.

    Attributes:
        chosen_counts: (E,) int64, the number of this rank's tokens that chose each expert.
        groups: the rows that each of this rank's experts gets, sorted by expert.
        counts: (E / e,) int64, the number of them.
    """

    def __init__(self, chosen: Tensor, num_experts: int, axis: Axis) -> None:
        self._axis, self._top_k, local = axis, chosen.shape[1], num_experts // axis.size
        by_expert, self._order = chosen.flatten().sort(stable=True)
        self._inverse = inverse_of(self._order)
        self.chosen_counts = count_per_expert(by_expert, num_experts)
        if axis.size == 1:
            self.counts = self.chosen_counts
            self.groups = Groups(self.counts, even_parts(len(by_expert), num_experts) if not has_values() else None)
            return
        sent = self.chosen_counts.view(axis.size, local)
        received = exchange_counts(sent, axis)
        self.counts = received.sum(0)
        counted = torch.cat([sent.sum(1), received.sum(1), self.counts])
        if not has_values():
            numbers = _even_numbers(even_parts(len(by_expert), num_experts), axis)
        else:
            numbers = counted.tolist()  # the only wait of the host
        self._sent, self._received = numbers[: axis.size], numbers[axis.size : 2 * axis.size]
        self.groups = Groups(self.counts, numbers[2 * axis.size :])
        experts = torch.arange(local, device=chosen.device).repeat(axis.size)
        by_source = experts.repeat_interleave(received.flatten(), output_size=sum(self._received))
        self._to_experts = by_source.argsort(stable=True)
        self._from_experts = inverse_of(self._to_experts)

    def send(self, tokens: Tensor) -> Tensor:
        """Return the rows for this rank's experts: (T, H) -> (rows, H), sorted by expert.

        Forward and backward: an all-to-all over the expert ranks; for uniform choices k T H (e-1)/e elements per rank.
        """
        rows = _Copies.apply(tokens, self._order, self._inverse, self._top_k)
        if self._axis.size == 1:
            return rows
        rows = exchange_rows(rows, self._axis, self._sent, self._received)
        return _Permute.apply(rows, self._to_experts, self._from_experts)

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sums of the experts' results: (rows, H) in the order of `send`, (T, k) -> (T, H).

        The weights multiply where the tokens came from, so that they need not travel. Communicates as `send` does.
        """
        if self._axis.size > 1:
            rows = _Permute.apply(rows, self._from_experts, self._to_experts)
            rows = exchange_rows(rows, self._axis, self._received, self._sent)
        results = _Permute.apply(rows, self._inverse, self._order).unflatten(0, weights.shape)
        weights = weights.to(results.dtype)
        if results.device.type == "cpu":  # reads and writes them once; on a GPU it is many products of one row
            return torch.bmm(weights.unsqueeze(1), results).squeeze(1)
        return (results * weights.unsqueeze(-1)).sum(1)


def inverse_of(order: Tensor) -> Tensor:
    """Return the inverse of a permutation, (n,)."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
