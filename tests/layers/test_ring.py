"""Ring attention on 1 to 4 ranks: the formula over full rows in fp64, forward and backward, and what it sends.

On a GPU torch's kernels compute the blocks, but those with bounds of scores or biases by distance, and those in fp64.
"""

from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.engine import device_type
from megatron_ds.layers.context import block_attention, blocks, ring
from megatron_ds.layers.context.blocks import Block, visible_blocks
from megatron_ds.layers.context.ring import merge_, ring_attention
from megatron_ds.layers.kernels import AttentionCall
from megatron_ds.parallel.context import ContextParallel, Runs
from megatron_ds.parallel.grid import Axis
from megatron_ds.parallel.messages import Messages
from megatron_ds.parallel.rank_info import RankInfo
from tests.layers.ring_cases import (
    CASES,
    FEW,
    TOLERANCE,
    B,
    D,
    K,
    N,
    Results,
    S,
    errors,
    of_rank,
    ring_of,
)
from tests.parallel.wire_bytes import Activations, counting
from tests.ranks import rank_device, run_ranks


def _cases(
    info: RankInfo, size: int, zigzag: bool, wanted: list[tuple[str, torch.dtype]], rows: int
) -> dict[tuple[str, torch.dtype], Results]:
    blocks._MOST_ROWS.update(cpu=rows, cuda=rows)  # of tiles: this process alone
    cp = ring_of(info, size, zigzag)
    return {one: of_rank(cp, CASES[one[0]], one[1]) for one in wanted}


@pytest.mark.parametrize(
    ("size", "zigzag", "rows"), [(1, True, 7), (2, True, 256), (2, False, 5), (3, True, 5), (4, True, 256)]
)
def test_equals_attention_over_full_rows(size: int, zigzag: bool, rows: int) -> None:
    """In fp64, where each case's difference is that of the order of sums; a few in fp32 and bf16."""
    wanted = [(name, torch.float64) for name in CASES] + list(product(FEW, (torch.float32, torch.bfloat16)))
    ranks = run_ranks(_cases, size, size, zigzag, wanted, rows)
    for name, dtype in wanted:
        found = errors([rank[name, dtype] for rank in ranks], CASES[name], dtype, zigzag)
        assert max(found) <= TOLERANCE[dtype], (name, dtype, found)


def pairs(found: list[Block], queries: Runs, keys: Runs) -> list[tuple[int, int]]:
    """Positions of each query and key that see one another in some block."""
    at = [[position for run in runs for position in run] for runs in (queries, keys)]
    return [
        (at[0][query], at[1][key])
        for block in found
        for i, query in enumerate(range(block.queries.start, block.queries.stop))
        for j, key in enumerate(range(block.keys.start, block.keys.stop))
        if not block.causal or j <= i
    ]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_blocks_have_each_visible_pair_once(size: int, zigzag: bool, fused: bool) -> None:
    length = 24
    places = ContextParallel(Axis(size), ring=Axis(size), zigzag=zigzag)
    for causal in (True, False):
        work = []
        for rank in range(size):
            found: list[tuple[int, int]] = []
            for source in range(size):
                queries, keys = places.ring_runs(length, rank), places.ring_runs(length, source)
                seen = visible_blocks(queries, keys, causal, fused)
                assert len(seen) <= 1 or not fused, "one call of a kernel in each step"
                found += pairs(seen, queries, keys)
            mine = [position for run in places.ring_runs(length, rank) for position in run]
            assert sorted(found) == sorted(
                (query, key) for query in mine for key in range(length) if not causal or key <= query
            )
            work.append(len(found))
        assert len(set(work)) == 1 or (causal and not zigzag), "even work"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_merging_is_the_softmax_over_all_keys(order: tuple[int, ...]) -> None:
    """Parts that see nothing, first, last or all of them, and parts whose scores are 80 apart."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(B, N, 5, 4, 3, generator=generator, dtype=torch.float64)  # by query, part and key
    values = torch.randn(B, N, 4, 3, D, generator=generator, dtype=torch.float64)
    scores[:, :, 0, 0], scores[:, :, 1, 3], scores[:, :, 2] = -torch.inf, -torch.inf, -torch.inf
    scores[:, :, 3, 1] += 80
    scores[:, :, 4, 2] -= 80
    total = torch.zeros(5, B, N, D)
    lse = torch.full((B, N, 5), -torch.inf)
    for part in order:
        out = scores[:, :, :, part].softmax(-1).nan_to_num(0) @ values[:, :, part]
        merge_(total, lse, out.float(), scores[:, :, :, part].logsumexp(-1).float())
    every = scores.flatten(-2)
    y = (every.softmax(-1).nan_to_num(0) @ values.flatten(2, 3)).permute(2, 0, 1, 3)
    torch.testing.assert_close(total.double(), y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), every.logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert not total[2].any()


def test_what_is_not_a_number_stays_so() -> None:
    total, lse = torch.zeros(1, 1, 2, D), torch.zeros(1, 2, 1)
    part = torch.tensor([[[torch.nan], [-torch.inf]]])
    merge_(total, lse, torch.ones(1, 2, 1, D), part)
    assert lse[0, 0].isnan() and total[0, 0, 0].isnan().all()
    assert lse[0, 1] == 0.0 and not total[0, 0, 1].any()


def _without_rescale(total: Tensor, lse: Tensor, out: Tensor, part: Tensor) -> None:
    total += out.permute(2, 0, 1, 3)
    lse.copy_(torch.logaddexp(lse, part))


def _all_see(block: Block, key_mask: Tensor | None, device: torch.device) -> Tensor:
    return torch.ones(1, block.queries.stop - block.queries.start, dtype=torch.bool, device=device)


def _limits_off_by_one(block: Block, *args: Any) -> Any:
    limits = _limits(block, *args)
    return limits and (limits[0], (limits[1] + 1).clamp(max=block.keys.stop - block.keys.start))


def _lse_of_last_step(self: Any, rows: slice) -> Any:
    whole = _of_queries(self, rows)
    return replace(whole, lse=whole.lse - 0.1)


def _others_gradients(self: Any) -> Any:
    _home(self)
    return self._sent


_of_queries, _home, _limits = block_attention.Whole.of_queries, ring._Circle.home, blocks._limits
TRAPS: dict[str, tuple[str, Any, str, Any]] = {
    "parts are not rescaled": ("causal", ring, "merge_", _without_rescale),
    "queries that see no key of a block": ("left padding", blocks, "_sees_any", _all_see),
    "a key too many": ("documents", blocks, "_limits", _limits_off_by_one),
    "the log-sum-exp of less": ("causal", block_attention.Whole, "of_queries", _lse_of_last_step),
    "gradients that are another rank's": ("causal", ring._Circle, "home", _others_gradients),
    "chunks in another order": ("causal", None, "", None),
}
"""Mistakes: a case that shows each, and the function that it is in, with the wrong one."""


def _trapped(info: RankInfo) -> dict[str, Results]:
    cp = ring_of(info, 2, True)
    found = {}
    for name, (case, owner, attribute, wrong) in TRAPS.items():
        stripes = replace(cp, zigzag=False) if owner is None else None
        with pytest.MonkeyPatch.context() as patch:
            if owner is not None:
                patch.setattr(owner, attribute, wrong)
            found[name] = of_rank(cp, CASES[case], torch.float64, stripes)
    return found


@pytest.mark.skipif(device_type() != "cpu", reason="the mistakes are made in flash attention on CPU")
def test_mistakes_are_seen() -> None:
    """Each is far above the bound of bf16, which is the largest."""
    ranks = run_ranks(_trapped, 2)
    for name, (case, *_) in TRAPS.items():
        found = errors([rank[name] for rank in ranks], CASES[case], torch.float64, True)
        assert max(found) > 5 * TOLERANCE[torch.bfloat16], (name, found)


def _sent(info: RankInfo, size: int, dtype: torch.dtype) -> tuple[Activations, Activations]:
    """What a rank sends in the forward and in the backward pass."""
    cp = ring_of(info, size, True)
    length = S // size
    like = {"dtype": dtype, "device": rank_device(), "requires_grad": True}
    q, k, v = (torch.randn(length, B, heads, D, **like) for heads in (N, K, K))
    with counting() as forward:
        y = ring_attention(q, k, v, AttentionCall(0.4), cp.ring, lambda rank: cp.ring_runs(S, rank))
    with counting() as backward:
        y.sum().backward()
    return forward, backward


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.bfloat16), (3, torch.float32), (4, torch.bfloat16)])
def test_bytes_are_those_of_the_formula(size: int, dtype: torch.dtype) -> None:
    kv = Fraction(S // size * B * K * D)
    for rank, (forward, backward) in enumerate(run_ranks(_sent, size, size, dtype)):
        assert forward.total == 2 * kv * (size - 1) * dtype.itemsize
        assert backward.total == 2 * kv * (size - 1) * dtype.itemsize + 2 * kv * size * 4
        assert forward.sent_to.keys() | backward.sent_to.keys() == {(rank + 1) % size}
        assert forward.calls == {"send": size - 1}, "keys and values in one message"
        assert backward.calls == {"send": 2 * size - 1}


def _order(info: RankInfo, size: int) -> list[str]:
    """What a rank does, in order: begins a hop, computes a block, waits for a hop."""
    cp, done = ring_of(info, size, True), []

    def recorded(owner: Any, name: str, word: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any) -> Any:
            done.append(word)
            return real(*args)

        setattr(owner, name, call)

    recorded(ring, "_begin_hop", "begin")
    recorded(Messages, "wait", "wait")
    kinds = block_attention.FlashOnCPU, block_attention.EfficientOnCUDA  # of fp32
    for kind, name in product(kinds, ("forward", "backward")):
        recorded(kind, name, "block")
    like = {"device": rank_device(), "requires_grad": True}
    q, k, v = (torch.randn(S // size, B, heads, D, **like) for heads in (N, K, K))
    y = ring_attention(q, k, v, AttentionCall(0.4), cp.ring, lambda rank: cp.ring_runs(S, rank))
    done.append("backward")
    y.sum().backward()
    return done


def test_hops_are_under_way_while_a_block_is_computed() -> None:
    forward = ["begin", "block", "wait", "begin", "block", "wait", "block"]
    first = ["begin", "block", "begin", "wait"]  # the second hop is that of gradients
    second = ["begin", "block", "wait", "begin", "wait"]  # the first wait is for gradients, which arrived meanwhile
    third = ["block", "wait", "begin", "wait"]
    assert run_ranks(_order, 3, 3) == [[*forward, "backward", *first, *second, *third]] * 3


def test_a_result_is_not_read_before_it_arrives() -> None:
    """Staged communication writes what is received when it is waited for."""
    wanted = [(name, torch.float64) for name in FEW]
    ranks = run_ranks(_cases, 3, 3, True, wanted, 256, staged=True)
    for name, dtype in wanted:
        assert max(errors([rank[name, dtype] for rank in ranks], CASES[name], dtype, True)) <= TOLERANCE[dtype]


def _strided(info: RankInfo) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients for tensors with strides of several kinds, and for contiguous ones."""
    cp = ring_of(info, 2, True)
    generator = torch.Generator().manual_seed(info.rank)
    wide = torch.randn(S // 2, B, K, 2, D, generator=generator).to(rank_device())
    q = torch.randn(B, S // 2, N, D, generator=generator).to(rank_device()).transpose(0, 1)

    def run(q: Tensor, k: Tensor, v: Tensor, expanded: bool) -> list[Tensor]:
        leaves = [one.detach().requires_grad_() for one in (q, k, v)]
        y = ring_attention(*leaves, AttentionCall(0.4), cp.ring, lambda rank: cp.ring_runs(S, rank))
        grad = y.new_ones(()).expand_as(y) if expanded else torch.ones_like(y)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    k, v = wide.unbind(-2)
    return run(q, k, v, True), run(q.contiguous(), k.contiguous(), v.contiguous(), False)


def test_strides_change_nothing() -> None:
    for strided, contiguous in run_ranks(_strided, 2):
        for one, other in zip(strided, contiguous, strict=True):
            assert torch.equal(one, other)
