"""Kernels of the blocks of a ring on CUDA: their operators are called as they demand, and the right one is chosen.

Here there is no GPU: torch's flash attention on CPU computes the operators' results. `test_ring.py` runs the kernels
themselves where there is one.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.layers.context import block_attention, blocks, ring
from megatron_ds.layers.context.blocks import Block
from megatron_ds.layers.context.ring import ring_attention
from megatron_ds.layers.kernels import AttentionCall
from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.rank_info import RankInfo
from tests.layers.ring_cases import (
    CASES,
    TOLERANCE,
    B,
    D,
    K,
    N,
    Results,
    S,
    drawn,
    errors,
    of_rank,
    on_device,
    ring_of,
    rounded,
    with_gradients,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize("name", ["causal", "documents, left padding", "everything", "another sequence, cap"])
def test_the_host_reads_nothing_from_a_device(name: str) -> None:
    """On torch's meta device a value that is read raises, and so does a tensor on another device."""
    tensors, call, grad = drawn(CASES[name])
    call = rounded(tensors, call, torch.bfloat16)
    inputs = [one.to("meta", torch.bfloat16) for one in tensors]

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        key_runs = (lambda rank: (range(len(k)),)) if CASES[name].other else None
        return ring_attention(q, k, v, call, Axis(), lambda rank: (range(S),), key_runs)

    found = with_gradients(attend, inputs, on_device(call, "meta"), grad.to("meta", torch.bfloat16))
    assert [one.dtype for one in found[:4]] == [torch.bfloat16] * 4


def _segments(cumulative: tuple[Tensor, Tensor], longest: tuple[int, int], causal: bool) -> list[tuple[slice, slice]]:
    """Rows of the queries and keys of each document that has both."""
    found = []
    for a, b, c, d in zip(*(part for one in cumulative for part in (one.tolist(), one.tolist()[1:]))):
        assert b - a <= longest[0] and d - c <= longest[1]
        assert not causal or b - a == d - c
        if a < b and c < d:
            found.append((slice(a, b), slice(c, d)))
    return found


class Varlen:
    """The operators of flash attention for documents, by that on CPU: (tokens, heads, D), lse (heads, tokens)."""

    _aten = torch.ops.aten

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, *options: Any, scale: float
    ) -> tuple[Tensor, ...]:
        *longest, dropout, causal, _ = options
        out, lse = torch.zeros_like(q), torch.full(q.shape[1::-1], torch.inf, dtype=q.dtype)
        for at, those in _segments((queries, keys), longest, causal):
            rows = (x.transpose(0, 1)[None] for x in (q[at], k[those], v[those]))
            y, part = self._aten._scaled_dot_product_flash_attention_for_cpu(*rows, dropout, causal, scale=scale)
            out[at], lse[:, at] = y[0].transpose(0, 1), part[0]
        return out, lse, q, q, q

    def _flash_attention_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> Any:
        out, lse, queries, keys, *longest, dropout, causal, _, _ = rest
        found = [torch.zeros_like(x) for x in (q, k, v)]
        for at, those in _segments((queries, keys), longest, causal):
            rows = (x.transpose(0, 1)[None] for x in (grad[at], q[at], k[those], v[those], out[at]))
            grads = self._aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *rows, lse[None, :, at], dropout, causal, scale=scale
            )
            for into, part, here in zip(found, grads, (at, those, those)):
                into[here] = part[0].transpose(0, 1)
        return found


class Efficient:
    """The operators of memory-efficient attention, by flash attention on CPU, with their demands on layout."""

    _aten = torch.ops.aten

    def _checked(self, q: Tensor, k: Tensor, v: Tensor, term: Tensor | None, causal: bool) -> dict[str, Any]:
        assert q.shape[1] == k.shape[1] == v.shape[1]
        if term is not None:
            assert term.shape == (*q.shape[:3], k.shape[2]) and term.dtype == q.dtype and term.isfinite().all()
            assert term.stride(3) == 1 and all(stride % 8 == 0 for stride in term.stride()[:3])
        return {"attn_mask": term, "is_causal": causal}

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, term: Tensor | None, keeps: bool, p: float, causal: bool, scale: float
    ) -> tuple[Tensor, ...]:
        options = self._checked(q, k, v, term, causal)
        out, lse = self._aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, p, scale=scale, **options)
        return out, torch.nn.functional.pad(lse, (0, -q.shape[2] % 32), value=torch.inf), q, q

    def _scaled_dot_product_efficient_attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, term: Tensor | None, *rest: Any, scale: float
    ) -> tuple[Tensor | None, ...]:
        out, lse, _, _, p, _, causal = rest
        options = self._checked(q, k, v, term, causal)
        assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
        assert lse.shape[2] % 32 == 0 and lse[..., q.shape[2] :].isposinf().all()
        lse = lse[..., : q.shape[2]]
        return (
            *self._aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(grad, q, k, v, out, lse, p, options["is_causal"]), attn_mask=term, scale=scale
            ),
            None,
        )


BY_TERMS = (
    *("causal", "one key head", "left padding", "a row of padding", "documents", "documents, left padding"),
    *("alibi, left padding", "alibi, documents", "sinks, left padding", "another sequence"),
)


def _by_terms(info: RankInfo, size: int, rows: int) -> dict[str, Results]:
    block_attention._ATEN = Efficient()  # in this process alone
    ring.block_attention = lambda q, call: block_attention.EfficientOnCUDA(call.scale)
    blocks._MOST_ROWS["cpu"] = rows
    cp = ring_of(info, size, True)
    return {name: of_rank(cp, CASES[name], torch.float64) for name in BY_TERMS}


@pytest.mark.parametrize(("size", "rows"), [(2, 7), (3, 256)])
def test_masks_as_terms_of_scores(size: int, rows: int) -> None:
    ranks = run_ranks(_by_terms, size, size, rows)
    for name in BY_TERMS:
        found = errors([rank[name] for rank in ranks], CASES[name], torch.float64, True)
        assert max(found) <= TOLERANCE[torch.float64], (name, found)


def _packed(info: RankInfo, size: int) -> Results:
    block_attention._ATEN = Varlen()  # in this process alone
    ring.block_attention = lambda q, call: block_attention.FlashOfDocuments(call.scale, call.longest)
    return of_rank(ring_of(info, size, True), CASES["documents"], torch.float64)


@pytest.mark.parametrize("size", [2, 3])
def test_documents_by_their_lengths(size: int) -> None:
    """Documents without a query, without a key, or without either in a block; several rows; keys of fewer heads."""
    ranks = run_ranks(_packed, size, size)
    assert max(errors(ranks, CASES["documents"], torch.float64, True)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "dim", "expected"),
    [
        ("causal", torch.bfloat16, (9, 0), 64, block_attention.FlashOnCUDA),
        ("sinks", torch.float16, (8, 0), 64, block_attention.FlashOnCUDA),
        ("another sequence", torch.bfloat16, (9, 0), 256, block_attention.FlashOnCUDA),
        ("documents", torch.bfloat16, (9, 0), 64, block_attention.FlashOfDocuments),
        ("documents, left padding", torch.bfloat16, (9, 0), 64, block_attention.EfficientOnCUDA),
        ("alibi", torch.bfloat16, (9, 0), 64, block_attention.EfficientOnCUDA),
        ("causal", torch.bfloat16, (9, 0), 320, block_attention.EfficientOnCUDA),
        ("causal", torch.float16, (7, 5), 64, block_attention.EfficientOnCUDA),
        ("causal", torch.float32, (9, 0), 64, block_attention.EfficientOnCUDA),
        ("causal", torch.float64, (9, 0), 64, block_attention.WrittenOut),
        ("causal", torch.bfloat16, (9, 0), 60, block_attention.WrittenOut),
        ("cap", torch.bfloat16, (9, 0), 64, block_attention.WrittenOut),
        ("distances", torch.bfloat16, (9, 0), 64, block_attention.WrittenOut),
    ],
)
def test_kernel_of_a_call_on_cuda(
    name: str, dtype: torch.dtype, capability: tuple[int, int], dim: int, expected: type, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q: Any = SimpleNamespace(dtype=dtype, device=SimpleNamespace(type="cuda"), shape=(S, B, N, dim))
    assert type(block_attention.block_attention(q, drawn(CASES[name])[1])) is expected


def test_kernels_on_cuda_have_these_arguments() -> None:
    """Its operators' shapes, on the meta device; here there is no kernel."""
    q, k = (torch.empty(S, B, heads, D, dtype=torch.bfloat16, device="meta").permute(1, 2, 0, 3) for heads in (N, K))
    flash, block = block_attention.FlashOnCUDA(0.4), Block(slice(0, S), slice(0, S), causal=True)
    out, lse = flash.forward(q, k, k, block)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (B, N, S), torch.float32)
    dq, dk, dv, _ = flash.backward(q, k, k, block, block_attention.Whole(out, out, lse, None))
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)
    for one in (block, replace(block, key_term=torch.zeros(B, 1, 1, S, device="meta"))):
        efficient = block_attention.EfficientOnCUDA(0.4)
        out, lse = efficient.forward(q, k, k, one)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (B, N, S), torch.float32)
        dq, dk, dv, _ = efficient.backward(q, k, k, one, block_attention.Whole(out, out, lse, None))
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)
    begins = torch.zeros(2 * B, dtype=torch.int32, device="meta")
    flash, block = block_attention.FlashOfDocuments(0.4, None), replace(block, segments=(begins, begins))
    out, lse = flash.forward(q, k, k, block)
    assert (out.shape, out.dtype, lse.dtype) == (q.shape, q.dtype, torch.float32)
    dq, dk, dv, _ = flash.backward(q, k, k, block, block_attention.Whole(out, out, lse, None))
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)
