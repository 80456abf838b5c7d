"""Language-model head and cross entropy over a vocabulary divided over the tensor axis (Shoeybi et al. 2019).

The full logits never exist, and they are never gathered: they are computed for one chunk of labelled tokens at a time,
turned into loss *and* gradient at once, and dropped. A chunk's fp32 logits, (chunk, V/t), are the largest extra tensor.
Tokens without a label (most tokens, in masked language modelling) cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import Axis

LEAST_CHUNK = 128  # tokens, however large the vocabulary is
LOGITS_BYTES = {"cpu": 2**27, "cuda": 2**29}  # of a chunk's fp32 logits: larger chunks do not speed up the matmuls


@dataclass(frozen=True)
class LogitFinish:
    """The change of the logits before the softmax: multiply by `multiplier`, then bound by `softcap`.

    softcap * tanh(logits / softcap) keeps them within +-softcap (Gemma 2, 2024); None = unbounded.
    """

    multiplier: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Map fp32 logits of the matmul to the final logits; may work in place."""
        if self.multiplier != 1.0:
            raw = raw * self.multiplier
        return torch.tanh(raw / self.softcap) * self.softcap if self.softcap is not None else raw

    def gradient(self, grad: Tensor, finished: Tensor | None) -> Tensor:
        """Map the gradient of the final logits to that of the raw ones. `finished`: final logits, for a softcap."""
        if self.softcap is not None:
            assert finished is not None
            grad = grad * (1.0 - (finished / self.softcap).square())
        return grad * self.multiplier if self.multiplier != 1.0 else grad


@dataclass(frozen=True)
class VocabShard:
    """This rank's shard of a language-model head.

    Attributes:
        weight: (padded V/t, H) rows.
        bias: (padded V/t,), or None.
        vocab_size: V without padding; padding rows take no part in the softmax and get zero gradient.
        axis: the tensor axis.
        finish: the change of the logits after the matmul.
    """

    weight: Tensor
    bias: Tensor | None
    vocab_size: int
    axis: Axis
    finish: LogitFinish = LogitFinish()

    @property
    def start(self) -> int:
        """The token id of the first row."""
        return min(self.axis.rank * self.weight.shape[0], self.vocab_size)

    @property
    def valid(self) -> int:
        """The number of rows that are not padding."""
        return min(self.start + self.weight.shape[0], self.vocab_size) - self.start


class _HeadLoss(torch.autograd.Function):
    """Sum of token losses from hidden states. The forward pass computes the gradients, for an output gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: VocabShard, chunk: int
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        start, valid, axis = head.start, head.valid, head.axis
        labelled = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        tokens, rows = hidden.flatten(0, -2)[labelled], weight[:valid]
        offsets = bias[:valid] if bias is not None else None
        flat_targets = targets.flatten()[labelled]
        # Gradients that are not yet multiplied by the loss scale would underflow in fp16: keep them in fp32 until then.
        exact = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        exact_rows = rows.to(exact)
        grad_hidden = torch.empty_like(tokens, dtype=exact) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(weight.shape[:1], dtype=torch.float32, device=weight.device) if wants_bias else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        buffer = torch.empty((min(chunk, tokens.shape[0]), valid), dtype=torch.float32, device=hidden.device)
        for begin in range(0, tokens.shape[0], chunk):
            part = slice(begin, begin + chunk)
            logits = head.finish(_project(tokens[part], rows, offsets, buffer))
            finished = logits.clone() if head.finish.softcap is not None else None
            chunk_loss, grad_logits = _chunk(logits, flat_targets[part], start, axis)
            loss += chunk_loss
            grad_logits = head.finish.gradient(grad_logits, finished)
            if grad_bias is not None:
                grad_bias[:valid] += grad_logits.sum(0)
            grad_logits = grad_logits.to(exact)
            if grad_hidden is not None:
                torch.mm(grad_logits, exact_rows, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight[:valid], grad_logits.t(), tokens[part].to(exact))
        ctx.grads = (
            _spread(grad_hidden, labelled, hidden) if grad_hidden is not None else None,
            grad_weight.to(exact) if grad_weight is not None else None,
            grad_bias.to(exact) if grad_bias is not None else None,
        )
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "the head's gradients were consumed by an earlier backward pass"
        own = (None if g is None else g.mul_(grads[0]).to(ctx.dtype) for g in ctx.grads)
        ctx.grads = None
        return *own, None, None, None


def _project(tokens: Tensor, rows: Tensor, offsets: Tensor | None, buffer: Tensor) -> Tensor:
    """Return the tokens' fp32 logits in `buffer`: allocating them per chunk would cost as much as the arithmetic."""
    into = buffer[: tokens.shape[0]]
    if rows.dtype != torch.float32:
        return into.copy_(F.linear(tokens, rows, offsets))
    torch.mm(tokens, rows.t(), out=into)
    return into if offsets is None else into.add_(offsets)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right, in one pass where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _spread(grads: Tensor, positions: Tensor, like: Tensor) -> Tensor:
    """Scatter (labelled, H) gradients to the shape of the hidden states `like`, with zeros elsewhere."""
    full = grads.new_zeros((like.shape[:-1].numel(), like.shape[-1]))
    return full.index_copy_(0, positions, grads).view_as(like)


def _chunk(logits: Tensor, targets: Tensor, start: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return the loss of some tokens and the gradient of their logits. Collective over tensor.

    Args:
        logits: (tokens, valid) this rank's columns, fp32, padding excluded. Overwritten.
        targets: (tokens,) ids in the full vocabulary.
        start: the id of this rank's first column.
        axis: the tensor axis. Two fp32 all-reduces: (tokens,) maxima and (2, tokens) sums.

    Returns:
        the scalar sum of the tokens' losses; (tokens, valid) fp32 gradient.
    """
    if logits.shape[1] > 0:
        peaks = logits.max(dim=-1).values
    else:
        peaks = logits.new_full((logits.shape[0],), -torch.inf)
    all_reduce_(peaks, axis, dist.ReduceOp.MAX)
    logits = logits.sub_(peaks[:, None])

    here = (targets >= start) & (targets < start + logits.shape[1])
    columns = (targets - start).masked_fill(~here, 0)[:, None]
    picked = logits.gather(1, columns).squeeze(1) if logits.shape[1] > 0 else torch.zeros_like(peaks)
    exps = logits.exp_()
    sums = torch.stack([exps.sum(dim=-1), picked.masked_fill(~here, 0.0)])
    all_reduce_(sums, axis)
    losses = sums[0].log() - sums[1]

    grad = exps.div_(sums[0][:, None])
    if logits.shape[1] > 0:
        grad.scatter_add_(1, columns, -here.to(grad.dtype)[:, None])
    return losses.sum(), grad


def head_loss(hidden: Tensor, head: VocabShard, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return the sum over labelled tokens of -log p(target). Collective over tensor.

    Forward: all-reduces of 3 fp32 numbers per labelled token. Backward: nothing.

    Args:
        hidden: (S, B, H), equal on all tensor ranks. Its gradient is a partial sum: enter through `copy_to` or
            `gather_sequence`, whose backward completes it.
        head: this rank's shard of the head.
        targets: (S, B) ids, IGNORE_INDEX where there is no label.
        chunk: labelled tokens whose logits exist at one time; None = as many as `LOGITS_BYTES` hold.

    Returns:
        fp32 scalar, equal on all tensor ranks.
    """
    weight, bias = head.weight, head.bias
    if chunk is None:  # the same on all tensor ranks, so from padded sizes: they communicate in every chunk
        chunk = max(LEAST_CHUNK, LOGITS_BYTES.get(hidden.device.type, 2**27) // (4 * weight.shape[0]))
    if not torch.is_grad_enabled():  # autograd.Function would compute gradients all the same
        hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach() if bias is not None else None
    return _HeadLoss.apply(hidden, weight, bias, targets, head, chunk)


@torch.no_grad()
def gather_logits(hidden: Tensor, head: VocabShard) -> Tensor:
    """Return the full logits on every tensor rank: (S, B, H) -> (S, B, V). Collective over tensor.

    One all-gather of all logits: for inspection, not for training.
    """
    local = head.finish(F.linear(hidden, head.weight, head.bias))
    if head.axis.size == 1:
        return local[..., : head.vocab_size]
    parts = [torch.empty_like(local) for _ in range(head.axis.size)]
    dist.all_gather(parts, local.contiguous(), group=head.axis.group)
    return torch.cat(parts, dim=-1)[..., : head.vocab_size]
