"""Language-model head and cross entropy over a vocabulary divided over the tensor axis (Shoeybi et al. 2019).

The full logits are never gathered, and rarely exist: they are computed for one chunk of labelled tokens at a time,
turned into loss *and* gradient at once, and dropped. The gradient takes their place in memory. Tokens without a label
(most tokens, in masked language modelling) cost nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.layers.device_kind import device_kind
from megatron_ds.layers.kernels import LogitFinish, LossCall
from megatron_ds.layers.kernels.cross_entropy import CrossEntropy, reference_cross_entropy
from megatron_ds.layers.products import add_product_, gradient_sum, linear, multiply_into
from megatron_ds.parallel.grid import Axis

__all__ = ["LogitFinish", "VocabShard", "gather_logits", "head_loss"]

TILE = 256  # tokens: chunks are multiples, so that the products' tiles are full
LOGITS_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Bytes of a chunk's logits. On a CPU larger chunks do not speed up the products; on a GPU each chunk also reads and
writes the fp32 sum of the weight's gradient, so it pays to have few."""
ALIGNMENT = {"cuda": 64}
"""Columns of the logits are a multiple of this: tensor cores load rows that begin at multiples of 16 bytes."""
HALF_RANGE = 2.0**15
"""Largest gradient of a logit in fp16, whose largest number is just below 2**16."""


@dataclass(frozen=True)
class VocabShard:
    """This rank's shard of a language-model head.

    Attributes:
        weight: (padded V/t, H) rows.
        bias: (padded V/t,), or None.
        vocab_size: V without padding; padding rows take no part in the softmax and get zero gradient.
        axis: the tensor axis.
        finish: the change of the logits after the matmul.
        kernel: the cross entropy; None = PyTorch's formula.
    """

    weight: Tensor
    bias: Tensor | None
    vocab_size: int
    axis: Axis
    finish: LogitFinish = field(default_factory=LogitFinish)
    kernel: CrossEntropy | None = None

    @property
    def start(self) -> int:
        """The token id of the first row."""
        return min(self.axis.rank * self.weight.shape[0], self.vocab_size)

    @property
    def valid(self) -> int:
        """The number of rows that are not padding."""
        return min(self.start + self.weight.shape[0], self.vocab_size) - self.start

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows (columns, H) of the matmul, and their offsets: the valid ones and padding to `ALIGNMENT`."""
        multiple = ALIGNMENT.get(device_kind(self.weight.device), 1)
        columns = -(-self.valid // multiple) * multiple
        if columns <= self.weight.shape[0]:
            return self.weight[:columns], self.bias[:columns] if self.bias is not None else None
        missing = columns - self.valid
        offsets = F.pad(self.bias[: self.valid], (0, missing)) if self.bias is not None else None
        return F.pad(self.weight[: self.valid], (0, 0, 0, missing)), offsets

    def gradient_scale(self) -> float:
        """Return the power of two that the logits' gradients are multiplied by until their products are summed.

        The gradient of a sum of losses is at most `multiplier` for each logit. In fp16 it is scaled to at most
        `HALF_RANGE`: probabilities are then exact to 2**-29 and zero below 2**-39, so that all of a vocabulary that
        round to zero weigh less than the rounding of the label's own gradient.
        """
        if self.weight.dtype != torch.float16:
            return 1.0
        return 2.0 ** math.floor(math.log2(HALF_RANGE / abs(self.finish.multiplier)))


class _Wanted(NamedTuple):
    """The gradients that autograd wants."""

    hidden: bool
    weight: bool
    bias: bool


class _Gradients:
    """Gradients of the labelled tokens' hidden states and of the head, added up over chunks.

    They are multiplied by `VocabShard.gradient_scale`, and are fp32 where a value in the dtype of the weights would be
    out of range (in fp16) or would be rounded again by the next chunk. Rows of padding are zero.
    """

    def __init__(self, head: VocabShard, tokens: Tensor, rows: Tensor, wanted: _Wanted, num_chunks: int) -> None:
        weight, self.rows = head.weight, rows
        self.local = len(weight)
        exact = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        summed = exact if num_chunks == 1 else torch.float32
        length = max(len(rows), self.local)
        self.hidden = torch.empty_like(tokens, dtype=exact) if wanted.hidden else None
        self.weight = weight.new_empty((length, weight.shape[1]), dtype=summed) if wanted.weight else None
        self.bias = weight.new_zeros(length, dtype=torch.float32) if wanted.bias else None
        if self.weight is not None:
            self.weight[len(rows) if num_chunks else 0 :] = 0

    def add(self, grad_logits: Tensor, tokens: Tensor, begin: int) -> None:
        """Add a chunk's gradients: those of its logits (chunk, columns), for its tokens (chunk, H) from `begin`."""
        columns = len(self.rows)
        if self.bias is not None:
            self.bias[:columns] += grad_logits.sum(0, dtype=torch.float32)
        if self.hidden is not None:
            multiply_into(self.hidden[begin : begin + len(tokens)], grad_logits, self.rows)
        if self.weight is not None:
            put = multiply_into if begin == 0 else add_product_
            put(self.weight[:columns], grad_logits.t(), tokens)

    def of_inputs(self, labelled: Tensor | None, hidden: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of the hidden states (S, B, H), of which `labelled` are those here, weight and bias."""
        full = self.hidden
        if full is not None and labelled is not None:
            full = full.new_zeros((hidden.shape[:-1].numel(), hidden.shape[-1])).index_copy_(0, labelled, full)
        return (
            full.view_as(hidden) if full is not None else None,
            self.weight[: self.local] if self.weight is not None else None,
            self.bias[: self.local] if self.bias is not None else None,
        )


class _HeadLoss(torch.autograd.Function):
    """Sum of token losses from hidden states. The forward pass computes the gradients, for an output gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        labelled: Tensor | None,
        head: VocabShard,
        chunk: int | None,
    ) -> Tensor:
        wanted = _Wanted(*ctx.needs_input_grad[:3])
        tokens, labels, labelled = _select(hidden, targets, labelled)
        rows, offsets = head.operands()
        size = chunk or _chunk_tokens(len(tokens), head, wanted)
        call = LossCall(head.start, head.valid, head.axis, head.finish, head.gradient_scale(), any(wanted))
        compute = head.kernel or reference_cross_entropy
        grads = _Gradients(head, tokens, rows, wanted, -(-len(tokens) // size))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        buffer = rows.new_empty((min(size, len(tokens)), len(rows)))
        for begin in range(0, len(tokens), size):
            part = slice(begin, begin + size)
            losses, grad_logits = compute(_project(tokens[part], rows, offsets, buffer), labels[part], call)
            loss += losses.sum()
            grads.add(grad_logits, tokens[part], begin)
        ctx.grads = grads.of_inputs(labelled, hidden)
        ctx.dtype, ctx.scale, ctx.weight_sum = weight.dtype, call.scale, gradient_sum(head.weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.grads is not None, "the head's gradients were consumed by an earlier backward pass"
        factor = grads[0] / ctx.scale if ctx.scale != 1.0 else grads[0]
        hidden, weight, bias = ctx.grads
        ctx.grads = None
        if weight is not None and ctx.weight_sum is not None:
            ctx.weight_sum.addcmul_(weight, factor)
            weight = None
        own = [None if grad is None else _multiplied(grad, factor, ctx.dtype) for grad in (hidden, weight, bias)]
        return *own, None, None, None, None


def _select(hidden: Tensor, targets: Tensor, labelled: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the labelled tokens (tokens, H), their labels, and their positions; None = all positions are labelled."""
    tokens, labels = hidden.flatten(0, -2), targets.flatten()
    if labelled is None:
        labelled = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if len(labelled) == len(labels):
        return tokens, labels, None
    return tokens[labelled], labels[labelled], labelled


def _chunk_tokens(tokens: int, head: VocabShard, wanted: _Wanted) -> int:
    """Return how many tokens' logits exist at one time: the same on all tensor ranks, which communicate in each chunk.

    Chunks are equal, and multiples of `TILE`. One chunk needs no fp32 sum of the weight's gradient in bf16: it is
    preferred if its logits weigh no more than those of a chunk and the sum.
    """
    length, width = head.weight.shape
    itemsize = head.weight.element_size() if head.kernel is not None else 4  # PyTorch's formula makes fp32 logits
    budget = LOGITS_BYTES.get(device_kind(head.weight.device), LOGITS_BYTES["cpu"])
    saved = 4 * length * width if wanted.weight and head.weight.dtype == torch.bfloat16 else 0
    if tokens * itemsize * length <= budget + saved:
        return max(tokens, 1)
    fitting = max(TILE, budget // (itemsize * length) // TILE * TILE)
    return -(-tokens // -(-tokens // fitting) // TILE) * TILE


def _project(tokens: Tensor, rows: Tensor, offsets: Tensor | None, buffer: Tensor) -> Tensor:
    """Return the tokens' logits in `buffer`: allocating them per chunk would cost as much as the arithmetic."""
    into = buffer[: len(tokens)]
    if offsets is not None and rows.dtype != torch.float32:
        return torch.addmm(offsets, tokens, rows.t(), out=into)  # the sum is rounded once
    multiply_into(into, tokens, rows.t())
    return into if offsets is None else into.add_(offsets)


def _multiplied(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad * factor in a dtype, in one pass; in place if it is the gradient's."""
    return torch.mul(grad, factor, out=grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype))


def head_loss(
    hidden: Tensor, head: VocabShard, targets: Tensor, labelled: Tensor | None = None, *, chunk: int | None = None
) -> Tensor:
    """Return the sum over labelled tokens of -log p(target). Collective over tensor.

    Forward: all-reduces of 3 fp32 numbers per labelled token. Backward: nothing.

    Args:
        hidden: (S, B, H), equal on all tensor ranks. Its gradient is a partial sum: enter through `copy_to` or
            `gather_sequence`, whose backward completes it.
        head: this rank's shard of the head.
        targets: (S, B) ids, IGNORE_INDEX where there is no label.
        labelled: (labels,) indices of the labels in the flat targets; None = find them, for which the host waits.
        chunk: labelled tokens whose logits exist at one time; None = as many as `LOGITS_BYTES` hold.

    Returns:
        fp32 scalar, equal on all tensor ranks.
    """
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # autograd.Function would compute gradients all the same
        hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach() if bias is not None else None
    return _HeadLoss.apply(hidden, weight, bias, targets, labelled, head, chunk)


@torch.no_grad()
def gather_logits(hidden: Tensor, head: VocabShard) -> Tensor:
    """Return the full logits on every tensor rank: (S, B, H) -> (S, B, V). Collective over tensor.

    One all-gather of all logits: for inspection, not for training.
    """
    local = head.finish(linear(hidden, head.weight, head.bias))
    if head.axis.size == 1:
        return local[..., : head.vocab_size]
    parts = [torch.empty_like(local) for _ in range(head.axis.size)]
    dist.all_gather(parts, local.contiguous(), group=head.axis.group)
    return torch.cat(parts, dim=-1)[..., : head.vocab_size]
