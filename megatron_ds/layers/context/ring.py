"""Ring attention (Liu et al. 2023): keys and values pass around a ring of ranks that divide the sequence.

Each rank keeps its queries. In r - 1 hops it sees the keys and values of all others, and merges the attention to each
by the log-sum-exp of the scores. A hop is under way while the block before it is computed. In the backward pass keys
and values travel again; their gradients, in fp32, travel with them, and make the full circle back to their owner.

For K and V of n elements each on a rank, b bytes each, a rank sends 2n(r - 1)b bytes forward, and 2n(r - 1)b + 8nr
backward.

No rank leaves out a hop because of its own masks, since others wait for what it passes on.

Dim legend: L positions of this rank, B batch, N query heads, K key and value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ds.layers.context.block_attention import BlockAttention, Whole, block_attention
from megatron_ds.layers.context.blocks import Form, RowBlocks
from megatron_ds.layers.kernels.reference import AttentionCall
from megatron_ds.parallel.context import Runs
from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.messages import Messages

RunsOf = Callable[[int], Runs]
"""Index in the ring -> the positions of that rank, ascending."""


@torch.compiler.disable
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, ring: Axis, runs: RunsOf, key_runs: RunsOf | None = None
) -> Tensor:
    """Attend to the keys and values of all ranks of a ring: (L, B, N, D) -> (L, B, N, D).

    Collective over the ring, forward and backward. The gradients of `call.sinks` and `call.distance_bias` are those of
    this rank's queries.

    Args:
        q: queries, (L, B, N, D); N is a multiple of K.
        k, v: this rank's keys and values, (L or C, B, K, D), of one shape on all ranks.
        call: options of attention over full rows, with masks and biases of all positions; without a window or dropout.
        ring: the ranks that divide the sequence.
        runs: positions of the queries, and of the keys if `key_runs` is None. Two ranks have none in common.
        key_runs: positions of keys of another sequence, which all queries see: no causality, no documents, and no
            biases by distance.
    """
    assert call.window is None and call.dropout == 0.0, call
    across = (call.causal, call.positions is not None, call.distance_bias is not None)
    assert key_runs is None or not any(across), call
    attention = block_attention(q, call)
    blocks = RowBlocks(call, runs(ring.rank), q.shape[1], q.shape[2], q.device, attention.form)
    row = _Row(call, attention, blocks, ring, key_runs or runs)
    return _RingAttention.apply(q, k, v, call.sinks, call.distance_bias, row)


@dataclass(frozen=True)
class _Row:
    """Everything about a call but its tensors with a gradient."""

    call: AttentionCall
    attention: BlockAttention
    blocks: RowBlocks
    ring: Axis
    key_runs: RunsOf


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, distance_bias: Tensor | None, row: _Row
    ) -> Tensor:
        kv = torch.stack([k, v])
        total, lse = _attend(q, kv, row)
        if sinks is not None:
            with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
            total.mul_(_of_queries((lse - with_sinks).exp()))
            lse = with_sinks
        out = total.to(q.dtype)
        ctx.save_for_backward(q, kv, out, lse.masked_fill(lse == -torch.inf, 0.0), sinks)
        ctx.row = row
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse, sinks = ctx.saved_tensors
        row: _Row = ctx.row
        grad, delta, dsinks = grads[0].contiguous(), None, None
        if row.attention.form is Form.TILES or sinks is not None:
            delta = (grad.to(lse.dtype) * out).sum(-1).permute(1, 2, 0)
        if sinks is not None:
            dsinks = -((sinks.to(lse.dtype)[:, None] - lse).exp() * delta).sum((0, 2)).to(sinks.dtype)
        dq, dkv, ddistances = _gradients(q, kv, Whole(_by_heads(grad), _by_heads(out), lse, delta), row)
        dk, dv = dkv.to(kv.dtype)
        return dq.to(q.dtype), dk, dv, dsinks, ddistances, None


def _attend(q: Tensor, kv: Tensor, row: _Row) -> tuple[Tensor, Tensor]:
    """Return the output, (L, B, N, D), and the log-sum-exp, (B, N, L), over the keys of all ranks, in fp32 or more.

    Args:
        q: (L, B, N, D).
        kv: this rank's keys and values, (2, L or C, B, K, D), which is sent.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    total = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], q.shape[2], q.shape[0]), -torch.inf, dtype=dtype)
    queries = _by_heads(q)
    for keys, here in _passing(kv, row):
        k, v = (_by_heads(part) for part in here)
        for block in row.blocks.with_keys(keys):
            at = block.queries
            out, part = row.attention.forward(queries[:, :, at], k[:, :, block.keys], v[:, :, block.keys], block)
            merge_(total[at], lse[..., at], out, part)
    return total, lse


def merge_(total: Tensor, lse: Tensor, out: Tensor, part: Tensor) -> None:
    """Add attention to further keys, in place.

    Args:
        total: attention to the keys so far, (T, B, N, D).
        lse: log-sum-exp of their scores, (B, N, T); -inf where there was none.
        out: attention to further keys, (B, N, T, D).
        part: log-sum-exp of theirs, (B, N, T).
    """
    share = torch.sigmoid(part - lse).masked_fill_(part == -torch.inf, 0.0)  # else NaN, where both are -inf
    total.lerp_(out.permute(2, 0, 1, 3).to(total.dtype), _of_queries(share))
    lse.copy_(torch.logaddexp(lse, part))


def _gradients(q: Tensor, kv: Tensor, whole: Whole, row: _Row) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of q and of this rank's kv, in fp32 or more, and of the biases by distance."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    distance_bias = row.call.distance_bias
    ddistances = None if distance_bias is None else torch.zeros_like(distance_bias, dtype=dtype)
    queries, into = _by_heads(q), _by_heads(dq)
    circle = _Circle(row.ring, kv, dtype)
    for keys, here in _passing(kv, row):
        k, v = (_by_heads(part) for part in here)
        dkv = circle.zeros()
        dk, dv = (_by_heads(part) for part in dkv)
        for block in row.blocks.with_keys(keys):
            at, those = block.queries, block.keys
            *parts, by_distance = row.attention.backward(
                *(queries[:, :, at], k[:, :, those], v[:, :, those], block, whole.of_queries(at))
            )
            for total, part in zip((into[:, :, at], dk[:, :, those], dv[:, :, those]), parts):
                total += part
            if ddistances is not None and by_distance is not None:
                ddistances[:, block.distances] += by_distance
        circle.add(dkv)
    if distance_bias is not None and ddistances is not None:
        ddistances = ddistances.to(distance_bias.dtype)
    return dq, circle.home(), ddistances


def _passing(kv: Tensor, row: _Row) -> Iterator[tuple[Runs, Tensor]]:
    """Yield the positions of each rank's keys, and its keys and values, from this rank's on.

    They are on their way to the next rank, and others on their way here, while the caller computes.
    """
    size, here, spare = row.ring.size, kv, None
    for step in range(size):
        received, hop = here, None
        if step < size - 1:
            received = torch.empty_like(kv) if spare is None else spare
            hop = _begin_hop(here, received, row.ring)
        yield row.key_runs((row.ring.rank - step) % size), here
        if hop is not None:
            hop.wait()
            here, spare = received, None if here is kv else here


class _Circle:
    """Sums for each rank of the ring that pass all others, which add their parts, and return.

    Args:
        ring: the ranks.
        like: a tensor of the shape of a part.
        dtype: of the sums.
    """

    def __init__(self, ring: Axis, like: Tensor, dtype: torch.dtype) -> None:
        self._ring, self._like, self._dtype = ring, like, dtype
        self._sent: Tensor | None = None
        self._received: Tensor | None = None
        self._hop: Messages | None = None
        self._free: list[Tensor] = []

    def zeros(self) -> Tensor:
        """Return memory for a part."""
        return self._buffer().zero_()

    def add(self, part: Tensor) -> None:
        """Add this rank's part for the rank that the sums which arrive next are for, and pass the sums on.

        Args:
            part: memory from `zeros`, which must not be read any more.
        """
        total = part
        if self._hop is not None:
            total = self._arrived().add_(part)
            self._free.append(part)
        if self._ring.size == 1:
            self._received = total
            return
        self._sent, self._received = total, self._buffer()
        self._hop = _begin_hop(self._sent, self._received, self._ring)

    def home(self) -> Tensor:
        """Return this rank's own sum."""
        return self._arrived()

    def _arrived(self) -> Tensor:
        if self._hop is not None:
            self._hop.wait()
            assert self._sent is not None
            self._free.append(self._sent)
        assert self._received is not None
        return self._received

    def _buffer(self) -> Tensor:
        return self._free.pop() if self._free else torch.empty_like(self._like, dtype=self._dtype)


def _begin_hop(sent: Tensor, received: Tensor, ring: Axis) -> Messages:
    """Start to send to the next rank of the ring, and to receive from the previous one, contiguous tensors."""
    after, before = (ring.ranks[(ring.rank + step) % ring.size] for step in (1, -1))
    operations = [
        dist.P2POp(dist.isend, sent, after, ring.group),
        dist.P2POp(dist.irecv, received, before, ring.group),
    ]
    return Messages(dist.batch_isend_irecv(operations))


def _by_heads(x: Tensor) -> Tensor:
    """(L, B, heads, D) -> (B, heads, L, D), the same memory."""
    return x.permute(1, 2, 0, 3)


def _of_queries(x: Tensor) -> Tensor:
    """(B, N, T) -> (T, B, N, 1), the same memory."""
    return x.permute(2, 0, 1)[..., None]
