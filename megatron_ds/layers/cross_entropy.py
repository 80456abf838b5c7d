"""Language-model head and cross entropy over a vocabulary divided over the tensor axis (Shoeybi et al. 2019).

The logits are never gathered and never whole: they are made chunk by chunk of tokens, turned into loss *and* gradient
at once, and dropped. A chunk's fp32 logits, (chunk, V/t), are the largest extra tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import Axis

IGNORE_INDEX = -100
CHUNK_TOKENS = 1024


class _HeadLoss(torch.autograd.Function):
    """Sum of token losses from hidden states; gradients are computed in the forward pass, for unit output gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, start: int, valid: int, axis: Axis, chunk: int
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        tokens, rows = hidden.flatten(0, -2), weight[:valid]
        flat_targets = targets.flatten()
        # fp16 has no room for gradients that the loss scale has not met yet: keep them in fp32 until it has.
        exact = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        exact_rows = rows.to(exact)
        grad_hidden = torch.empty_like(tokens, dtype=exact) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, tokens.shape[0], chunk):
            part = slice(begin, begin + chunk)
            chunk_loss, grad_logits = _chunk(tokens[part] @ rows.t(), flat_targets[part], start, axis)
            loss += chunk_loss
            grad_logits = grad_logits.to(exact)
            if grad_hidden is not None:
                torch.mm(grad_logits, exact_rows, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight[:valid] += grad_logits.t() @ tokens[part].to(exact)
        ctx.grads = (
            grad_hidden.view_as(hidden) if grad_hidden is not None else None,
            grad_weight.to(exact) if grad_weight is not None else None,
        )
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "the head's gradients were consumed by an earlier backward pass"
        grad_hidden, grad_weight = (None if g is None else g.mul_(grads[0]).to(ctx.dtype) for g in ctx.grads)
        ctx.grads = None
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunk(logits: Tensor, targets: Tensor, start: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Loss of some tokens and its gradient to their logits.

    Args:
        logits: (tokens, valid) this rank's columns, padding excluded.
        targets: (tokens,) whole-vocabulary ids, IGNORE_INDEX where there is no label.
        start: the id of this rank's first column.
        axis: the tensor axis. Two all-reduces: (tokens,) maxima, (2, tokens) sums, fp32.

    Returns:
        the scalar sum of the labelled tokens' losses; (tokens, valid) fp32 gradient.
    """
    logits = logits.float()
    if logits.shape[1] > 0:
        peaks = logits.max(dim=-1).values
    else:
        peaks = logits.new_full((logits.shape[0],), -torch.inf)
    all_reduce_(peaks, axis, dist.ReduceOp.MAX)
    logits = logits.sub_(peaks[:, None])

    labelled = targets != IGNORE_INDEX
    here = labelled & (targets >= start) & (targets < start + logits.shape[1])
    columns = (targets - start).masked_fill(~here, 0)[:, None]
    picked = logits.gather(1, columns).squeeze(1) if logits.shape[1] > 0 else torch.zeros_like(peaks)
    exps = logits.exp_()
    sums = torch.stack([exps.sum(dim=-1), picked.masked_fill(~here, 0.0)])
    all_reduce_(sums, axis)
    losses = (sums[0].log() - sums[1]).masked_fill(~labelled, 0.0)

    grad = exps.div_(sums[0][:, None])
    if logits.shape[1] > 0:
        grad.scatter_add_(1, columns, -here.to(grad.dtype)[:, None])
    return losses.sum(), grad.mul_(labelled[:, None])


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, axis: Axis, chunk: int = CHUNK_TOKENS
) -> Tensor:
    """Sum over labelled tokens of -log p(target).

    Args:
        hidden: (S, B, H), equal on all tensor ranks. Its gradient is a partial sum: enter through `copy_to` or
            `gather_sequence`, whose backward completes it.
        weight: (padded V/t, H) this rank's rows of the head.
        targets: (S, B) ids, IGNORE_INDEX where there is no label.
        vocab_size: V without padding; padding rows take no part in the softmax and get zero gradient.
        axis: the tensor axis. A chunk communicates 3 fp32 numbers a token.
        chunk: tokens whose logits exist at one time.

    Returns:
        fp32 scalar, equal on all tensor ranks.
    """
    share = weight.shape[0]
    start = min(axis.rank * share, vocab_size)
    valid = min(start + share, vocab_size) - start
    if not torch.is_grad_enabled():  # autograd.Function would make gradients even so
        hidden, weight = hidden.detach(), weight.detach()
    return _HeadLoss.apply(hidden, weight, targets, start, valid, axis, chunk)


@torch.no_grad()
def gather_logits(hidden: Tensor, weight: Tensor, *, vocab_size: int, axis: Axis) -> Tensor:
    """(S, B, H) -> (S, B, V) on every tensor rank. For inspection, never for training: an all-gather of all logits."""
    local = hidden @ weight.t()
    if axis.size == 1:
        return local[..., :vocab_size]
    parts = [torch.empty_like(local) for _ in range(axis.size)]
    dist.all_gather(parts, local.contiguous(), group=axis.group)
    return torch.cat(parts, dim=-1)[..., :vocab_size]
