"""Attention of one block, with the log-sum-exp of its scores, by which blocks are merged.

The backward pass of a block is that of attention over all keys, restricted to the block's: with the output and the
log-sum-exp over *all* keys, exp(scores - lse) are the probabilities of the full softmax (Dao et al. 2022, section
3.1; Liu et al. 2023). Functions of torch that compute it are called by their operators, since the public function
does not return the log-sum-exp, and autograd would not know its gradient.

Dim legend: B batch, N query heads, K key and value heads, T queries and C keys of the block, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.context.blocks import Block, Form
from megatron_ds.layers.device_kind import GPU, device_kind
from megatron_ds.layers.kernels.reference import AttentionCall

_ATEN = torch.ops.aten
_MOST_DIMS = 256  # of a head, for flash attention on a GPU
_LSE_MULTIPLE = 32  # the length of a log-sum-exp, for memory-efficient attention
_TERM_MULTIPLE = 16  # the length of a row of its term


@dataclass(frozen=True)
class Whole:
    """Parts of the results over all keys, for the queries of a block.

    Attributes:
        grad: gradient of the output, (B, N, T, D).
        out: the output, (B, N, T, D).
        lse: log-sum-exp of the scores, (B, N, T); 0 where a query sees no key.
        delta: sum of the gradient times the output, (B, N, T).
    """

    grad: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor | None

    def of_queries(self, rows: slice) -> Whole:
        """Return the parts for some of the queries."""
        delta = None if self.delta is None else self.delta[..., rows]
        return Whole(self.grad[:, :, rows], self.out[:, :, rows], self.lse[..., rows], delta)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Those of q, k, v, and of the block's part of `AttentionCall.distance_bias`, (N, T + C - 1)."""


class BlockAttention(Protocol):
    """Attention of q (B, N, T, D) to k and v (B, K, C, D); N is a multiple of K."""

    @property
    def form(self) -> Form:
        """The blocks that it needs. One that keeps scores also needs the sums of gradients times outputs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Return the output, (B, N, T, D), and the log-sum-exp, (B, N, T): zero and -inf if a query sees no key."""

    def backward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, whole: Whole) -> Gradients:
        """Return the block's parts of the gradients."""


def block_attention(q: Tensor, call: AttentionCall) -> BlockAttention:
    """Return the implementation for a call: a kernel of torch where one has all options, else the formula.

    Args:
        q: a tensor of the dtype, device and head dim (last) of the queries.
        call: options of attention.
    """
    if call.softcap is not None or call.distance_bias is not None:
        return WrittenOut(call)
    if q.device.type == "cpu":
        return FlashOnCPU(call.scale)
    if device_kind(q.device) != GPU or q.dtype == torch.float64 or q.shape[-1] % 8 != 0:
        return WrittenOut(call)
    has_flash = q.dtype != torch.float32 and _is_ampere_or_later(q.device)
    is_masked = call.key_mask is not None or call.key_bias is not None
    if has_flash and not is_masked and q.shape[-1] <= _MOST_DIMS:
        if call.positions is None:
            return FlashOnCUDA(call.scale)
        if call.bounds is not None:
            return FlashOfDocuments(call.scale, call.longest)
    return EfficientOnCUDA(call.scale)


def _is_ampere_or_later(device: torch.device) -> bool:
    return device.type == "meta" or torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(frozen=True)
class FlashOnCPU:
    """torch's flash attention on CPU, which adds a term to the scores."""

    scale: float
    form: Form = Form.WHOLE

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, block.causal, attn_mask=_term(block, q), scale=self.scale
        )
        # the operator's log-sum-exp of no key is 0
        return out, lse if block.seen is None else lse.masked_fill(~block.seen[:, None], -torch.inf)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, whole: Whole) -> Gradients:
        dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *(whole.grad, q, k, v, whole.out, whole.lse, 0.0, block.causal),
            attn_mask=_term(block, q),
            scale=self.scale,
        )
        return dq, dk, dv, None


def _term(block: Block, q: Tensor) -> Tensor | None:
    """Return the term of the scores, with -inf at the pairs that limits leave out."""
    dtype = _score_dtype(q)
    term = None if block.key_term is None else block.key_term.to(dtype)
    if block.limits is None:
        return term
    return torch.where(block.inside(block.limits), q.new_zeros((), dtype=dtype) if term is None else term, -torch.inf)


@dataclass(frozen=True)
class FlashOnCUDA:
    """torch's flash attention on CUDA, in 16 bits, for blocks without a term. A causal one has as many queries as keys.

    It has not been run on a GPU.
    """

    scale: float
    form: Form = Form.WHOLE

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, block.causal, scale=self.scale)
        return out, lse[..., : q.shape[2]]  # some releases round its length up

    def backward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, whole: Whole) -> Gradients:
        """Call the operator for rows without packed lengths and without dropout, whose state it does not read."""
        no_lengths, no_state = None, q.new_empty(0, dtype=torch.int64)
        lse = whole.lse.contiguous()  # the kernel reads it without strides
        dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_backward(
            *(whole.grad, q, k, v, whole.out, lse, no_lengths, no_lengths, q.shape[2], k.shape[2]),
            *(0.0, block.causal, no_state, no_state),
            scale=self.scale,
        )
        return dq, dk, dv, None


@dataclass(frozen=True)
class FlashOfDocuments:
    """torch's flash attention on CUDA, in 16 bits, for documents of variable length. It has not been run on a GPU.

    Attributes:
        longest: bound of the length of documents, known to the host; None = the length of the row.
    """

    scale: float
    longest: int | None
    form: Form = Form.SEGMENTS

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _ATEN._flash_attention_forward(
            *map(_tokens, (q, k, v)), *self._lengths(q, k, block), 0.0, block.causal, False, scale=self.scale
        )
        lse = lse.unflatten(1, (len(q), -1)).transpose(0, 1)
        # releases differ in the infinity of a query without a key
        return _of_rows(out, len(q)), lse.masked_fill(lse.isinf(), -torch.inf)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, whole: Whole) -> Gradients:
        """Call the operator without dropout, whose state it does not read."""
        no_state = q.new_empty(0, dtype=torch.int64)
        grads = _ATEN._flash_attention_backward(
            *map(_tokens, (whole.grad, q, k, v, whole.out)),
            *(whole.lse.transpose(0, 1).flatten(1), *self._lengths(q, k, block), 0.0, block.causal),
            *(no_state, no_state),
            scale=self.scale,
        )
        dq, dk, dv = (_of_rows(grad, len(q)) for grad in grads)
        return dq, dk, dv, None

    def _lengths(self, q: Tensor, k: Tensor, block: Block) -> tuple[Tensor, Tensor, int, int]:
        """Return the segments of queries and keys, and bounds of the longest ones.

        Those are at least 2, as the operator has another result for one query.
        """
        assert block.segments is not None
        queries, keys = (max(2, min(self.longest or length, length)) for length in (q.shape[2], k.shape[2]))
        return *block.segments, queries, keys


def _tokens(x: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B * L, heads, D), which is a view if B is 1."""
    return x.transpose(1, 2).flatten(0, 1)


def _of_rows(x: Tensor, batch: int) -> Tensor:
    """Undo `_tokens`: (B * L, heads, D) -> (B, heads, L, D)."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


@dataclass(frozen=True)
class EfficientOnCUDA:
    """torch's memory-efficient attention on CUDA, which adds a term to the scores. It has not been run on a GPU."""

    scale: float
    form: Form = Form.WHOLE

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        k, v = (_for_each_head(part, q.shape[1]) for part in (k, v))
        out, lse, *_ = _ATEN._scaled_dot_product_efficient_attention(
            q, k, v, _aligned_term(block, q, k), True, 0.0, block.causal, scale=self.scale
        )
        lse = lse[..., : q.shape[2]]  # its length is rounded up
        return out, lse if block.seen is None else lse.masked_fill(~block.seen[:, None], -torch.inf)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, whole: Whole) -> Gradients:
        """Call the operator with a contiguous output and a log-sum-exp of rounded length, as its forward makes them."""
        out = whole.out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = F.pad(whole.lse, (0, -q.shape[2] % _LSE_MULTIPLE), value=torch.inf).contiguous()
        keys, values = (_for_each_head(part, q.shape[1]) for part in (k, v))
        no_state = q.new_empty(0, dtype=torch.int64)  # of dropout
        dq, dk, dv, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
            *(whole.grad, q, keys, values, _aligned_term(block, q, k), out, lse, no_state, no_state, 0.0),
            *([True, True, True, False], block.causal),
            scale=self.scale,
        )
        dk, dv = (part.unflatten(1, (k.shape[1], -1)).sum(2) for part in (dk, dv))
        return dq, dk, dv, None


def _for_each_head(x: Tensor, num_heads: int) -> Tensor:
    """(B, K, C, D) -> (B, N, C, D): repeat the key heads for the query heads that read them."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _aligned_term(block: Block, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the term of the scores, (B, N, T, C) in the dtype of q, in rows of aligned length.

    It is finite, since a query whose scores are all -inf would be NaN.
    """
    term = _term(block, q)
    if term is None:
        return None
    term = term.clamp(min=torch.finfo(q.dtype).min / 2).to(q.dtype)
    padded = F.pad(term, (0, -term.shape[-1] % _TERM_MULTIPLE))
    return padded[..., : term.shape[-1]].expand(*q.shape[:3], k.shape[2])


@dataclass(frozen=True)
class WrittenOut:
    """The formula, with every option but dropout; scores and probabilities are (B, N, T, C) tensors in fp32."""

    call: AttentionCall
    form: Form = Form.TILES

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        scores = self._scores(_products(q, k), self._biases(block), block)
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)  # a row may be -inf throughout
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out = _times_values(weights.to(v.dtype), v) / total.clamp(min=1.0)  # it is 0, or the top's 1 and more
        return out, (top + total.log()).squeeze(-1)

    def backward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, whole: Whole) -> Gradients:
        """Compute the gradients of `products` and of biases by autograd, given that of the scores."""
        assert whole.delta is not None
        with torch.enable_grad():
            products = _products(q, k).requires_grad_()
            biases = self._biases(block)
            scores = self._scores(products, biases if biases is None else biases.requires_grad_(), block)
        probabilities = (scores.detach() - whole.lse[..., None]).exp_()
        dv = _by_keys(probabilities.to(v.dtype), whole.grad, v)
        dscores = _products(whole.grad, v).to(scores.dtype).sub_(whole.delta[..., None]).mul_(probabilities)
        leaves = [products] if biases is None else [products, biases]
        dproducts, *dbiases = torch.autograd.grad(scores, leaves, dscores)
        dproducts = dproducts.to(q.dtype)
        return _times_values(dproducts, k), _by_keys(dproducts, q, k), dv, dbiases[0] if dbiases else None

    def _biases(self, block: Block) -> Tensor | None:
        """Return the block's part of the biases by distance, (N, T + C - 1)."""
        biases = self.call.distance_bias
        return None if biases is None else biases[:, block.distances].detach().to(_score_dtype(biases))

    def _scores(self, products: Tensor, biases: Tensor | None, block: Block) -> Tensor:
        """Return the scores of products of queries and keys, (B, N, T, C)."""
        scores = products.to(_score_dtype(products)) * self.call.scale
        if self.call.softcap is not None:
            scores = torch.tanh(scores / self.call.softcap) * self.call.softcap
        if block.key_term is not None:
            scores = scores + block.key_term
        if biases is not None:
            scores = scores + biases.unfold(1, scores.shape[-1], 1).flip(1)  # the last query has the first distances
        return scores if block.limits is None else scores.masked_fill(~block.inside(block.limits), -torch.inf)


def _score_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _in_groups(x: Tensor, kv_heads: int) -> Tensor:
    """Put the queries that read one key head after one another: (B, N, T, X) -> (B, K, N/K * T, X)."""
    return x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _of_heads(x: Tensor, num_queries: int) -> Tensor:
    """Undo `_in_groups`: (B, K, N/K * T, X) -> (B, N, T, X)."""
    return x.unflatten(2, (-1, num_queries)).flatten(1, 2)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Multiply queries (B, N, T, D) with the keys (B, K, C, D) that they read -> (B, N, T, C)."""
    return _of_heads(_in_groups(x, y.shape[1]) @ y.transpose(-1, -2), x.shape[2])


def _times_values(weights: Tensor, y: Tensor) -> Tensor:
    """Sum values (B, K, C, D) by the weights (B, N, T, C) of each query -> (B, N, T, D)."""
    return _of_heads(_in_groups(weights, y.shape[1]) @ y, weights.shape[2])


def _by_keys(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sum queries (B, N, T, D) by their weights (B, N, T, C) for each key of y (B, K, C, D) -> (B, K, C, D)."""
    return _in_groups(weights, y.shape[1]).transpose(-1, -2) @ _in_groups(x, y.shape[1])
