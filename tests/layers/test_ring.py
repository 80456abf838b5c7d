"""Ring attention on 1 to 4 ranks: the formula over full rows in fp64, forward and backward, and what it sends.

On a GPU they run torch's kernels, but for bounds of scores, biases by distance and fp64, which are written out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.columns import DOCUMENT_BOUNDS, POSITION_IDS
from megatron_ds.engine import device_type
from megatron_ds.layers.context import block_attention, blocks, ring
from megatron_ds.layers.context.blocks import Block, visible_blocks
from megatron_ds.layers.context.ring import merge_, ring_attention
from megatron_ds.layers.documents import DocumentLimit, with_document_bounds
from megatron_ds.layers.kernels import AttentionCall
from megatron_ds.layers.kernels.reference import reference_mask
from megatron_ds.parallel.context import ContextParallel, Runs, as_index
from megatron_ds.parallel.grid import Axis, Layout, create_grid
from megatron_ds.parallel.messages import Messages
from megatron_ds.parallel.rank_info import RankInfo
from tests.parallel.wire_bytes import Activations, counting
from tests.ranks import rank_device, run_ranks

S, B, N, K, D = 48, 2, 4, 2, 16
CPU = torch.device("cpu")
TOLERANCE = {
    torch.float64: 5e-15,
    torch.float32: 1e-6 if device_type() == "cpu" else 1e-5,  # a GPU's matrix units compute it from shorter parts
    torch.bfloat16: 1e-2,
}
"""Norm of a difference from fp64, relative to the result's: twice what is seen, which is a few roundings of each."""


@dataclass(frozen=True)
class Case:
    """A call of attention over full rows.

    Attributes:
        options: what is given to `AttentionCall`, besides masks.
        key_mask, positions: (B, S).
        has_bias, has_distances, has_sinks: there are key biases, biases by distance, sinks.
        kv_heads: K.
        other: length of another sequence, which the keys are of.
    """

    options: dict[str, Any]
    key_mask: Tensor | None = None
    positions: Tensor | None = None
    has_bias: bool = False
    has_distances: bool = False
    has_sinks: bool = False
    kv_heads: int = K
    other: int | None = None


def documents(*lengths: list[int]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(one) for one in row]) for row in lengths])


def padded(left: int, right: int = 0) -> Tensor:
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, :left] = False
    mask[1, S - right :] = False
    return mask


PACKED = documents([20, 1, 9, 18], [5, 43])  # across each border of ranks; one token; most of a row
NOTHING = padded(0)
NOTHING[0] = False
CASES = {
    "causal": Case({}),
    "one key head": Case({}, kv_heads=1),
    "all key heads": Case({}, kv_heads=N),
    "both sides": Case({"causal": False}),
    "left padding": Case({}, padded(30, 3)),  # longer than the part of a rank, and than chunks of zigzag order
    "left padding, both sides": Case({"causal": False}, padded(30, 3)),
    "a row of padding": Case({}, NOTHING),
    "documents": Case({}, positions=PACKED),
    "documents, left padding": Case({}, padded(21, 3), PACKED),
    "cap": Case({"softcap": 0.9}),
    "cap, documents, padding": Case({"softcap": 0.9}, padded(13, 3), PACKED),
    "alibi": Case({}, has_bias=True),
    "alibi, left padding": Case({}, padded(30), has_bias=True),
    "alibi, documents": Case({}, positions=PACKED, has_bias=True),
    "distances": Case({}, has_distances=True),
    "distances, both sides, padding": Case({"causal": False}, padded(30, 3), has_distances=True),
    "sinks": Case({}, has_sinks=True),
    "sinks, left padding": Case({}, padded(30), has_sinks=True),
    "everything": Case({"softcap": 0.9}, padded(2, 3), PACKED, has_bias=True, has_distances=True, has_sinks=True),
    "another sequence": Case({"causal": False}, other=36),
    "another sequence, cap": Case({"causal": False, "softcap": 0.9}, other=24),
}
FEW = ("causal", "left padding", "documents", "documents, left padding", "everything")
Results = tuple[Tensor, ...]
"""Output, and the gradients of q, k, v, sinks and biases by distance, as far as a case has them."""


def drawn(case: Case) -> tuple[list[Tensor], AttentionCall, Tensor]:
    """Full q, k, v; the call; and the gradient of the output, all in fp64."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    length = case.other or S
    tensors = [random(S, B, N, D), random(length, B, case.kv_heads, D), random(length, B, case.kv_heads, D)]
    grad, bias, limit, bounds = random(S, B, N, D), random(1, N, length), DocumentLimit(), None
    if case.positions is not None:
        bounds = with_document_bounds([{POSITION_IDS.name: case.positions}], limit)[0][DOCUMENT_BOUNDS]
    call = AttentionCall(
        0.4,
        **case.options,
        key_mask=case.key_mask,
        positions=case.positions,
        bounds=bounds,
        longest=limit.longest,
        key_bias=bias if case.has_bias else None,
        distance_bias=random(N, 2 * S - 1) if case.has_distances else None,
        sinks=random(N) if case.has_sinks else None,
    )
    return tensors, call, grad


def rounded(tensors: list[Tensor], call: AttentionCall, dtype: torch.dtype) -> AttentionCall:
    """Round the operands to a dtype, in place, so that only the computation is compared; biases as layers have them."""
    kinds = {"key_bias": dtype, "distance_bias": torch.promote_types(dtype, torch.float32), "sinks": dtype}
    for tensor in tensors:
        tensor.copy_(tensor.to(dtype))
    found = {name: getattr(call, name) for name in kinds}
    return replace(call, **{name: one.to(kinds[name]) for name, one in found.items() if one is not None})


def on_device(call: AttentionCall, device: torch.device | str) -> AttentionCall:
    """The same call with its masks and biases on a device."""
    names = ("key_mask", "positions", "bounds", "key_bias", "distance_bias", "sinks")
    found = {name: getattr(call, name) for name in names}
    return replace(call, **{name: one.to(device) for name, one in found.items() if one is not None})


def by_formula(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Attention over full rows, in fp64: with -inf where nothing may be seen, and zero for a query that sees none."""
    q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
    k, v = (part.repeat_interleave(N // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.key_bias is not None:
        scores = scores + call.key_bias.double()[:, :, None]
    if call.distance_bias is not None:
        offsets = torch.arange(S) - torch.arange(S)[:, None] + S - 1
        scores = scores + call.distance_bias.double()[:, offsets]
    if q.shape[2] == k.shape[2]:
        seen = reference_mask(S, call, CPU)
        blind = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~seen & ~blind, -torch.inf)
    else:
        blind = torch.zeros((), dtype=torch.bool)
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    y = scores.softmax(-1)[..., : k.shape[2]] @ v
    return y.masked_fill(blind, 0.0).permute(2, 0, 1, 3)


def with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor], call: AttentionCall, grad: Tensor) -> Results:
    leaves = [one.detach().requires_grad_() for one in inputs]
    learned = {name: getattr(call, name) for name in ("sinks", "distance_bias")}
    learned = {name: one.detach().requires_grad_() for name, one in learned.items() if one is not None}
    y = attend(*leaves, replace(call, **learned))
    return (y.detach(), *torch.autograd.grad(y, [*leaves, *learned.values()], grad))


def expected(case: Case, dtype: torch.dtype) -> Results:
    tensors, call, grad = drawn(case)
    call = rounded([*tensors, grad], call, dtype)
    return with_gradients(by_formula, tensors, call, grad)


def ring_of(info: RankInfo, size: int, zigzag: bool) -> ContextParallel:
    axis = create_grid(Layout(context=size), info.rank, ulysses=1).ring
    return ContextParallel(axis, ring=axis, method="ring", zigzag=zigzag)


def of_rank(cp: ContextParallel, case: Case, dtype: torch.dtype, stripes: ContextParallel | None = None) -> Results:
    """The results of this rank's positions; `stripes` has those that attention is given, if they are others."""
    tensors, call, grad = drawn(case)
    call = on_device(rounded([*tensors, grad], call, dtype), rank_device())
    if not call.causal:
        cp = replace(cp, zigzag=False)
    at, other_at = (as_index(cp.ring_runs(len(one)), CPU) for one in tensors[:2])
    places = stripes or cp

    def runs(rank: int) -> Runs:
        return places.ring_runs(S, rank)

    def key_runs(rank: int) -> Runs:
        return places.ring_runs(case.other or S, rank)

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        return ring_attention(q, k, v, call, cp.ring, runs, key_runs if case.other else None)

    rows = (at, other_at, other_at, at)
    *parts, grad = (one[mine].to(rank_device(), dtype) for one, mine in zip((*tensors, grad), rows))
    return with_gradients(attend, parts, call, grad)


def errors(ranks: list[Results], case: Case, dtype: torch.dtype, zigzag: bool) -> list[float]:
    """Norm of each result's difference from fp64, relative to the result's."""
    size, whole = len(ranks), expected(case, dtype)
    axes = [Axis(size, rank, tuple(range(size))) for rank in range(size)]
    found = []
    for index, wanted in enumerate(whole):
        parts = [one[index].double() for one in ranks]
        if index < 4:
            put = torch.full_like(wanted, torch.nan)
            for axis, part in zip(axes, parts):
                cp = ContextParallel(axis, ring=axis, zigzag=zigzag and case.options.get("causal", True))
                put[as_index(cp.ring_runs(len(wanted)), CPU)] = part
        else:
            put = sum(parts, torch.zeros_like(wanted, dtype=torch.float64))
        found.append(float((put - wanted.double()).norm() / wanted.double().norm()))
    return found


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
    for kind, name in product((block_attention.FlashOnCPU, block_attention.WrittenOut), ("forward", "backward")):
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
