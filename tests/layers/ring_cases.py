"""Calls of attention for ring attention, by its formula over full rows in fp64, and by a rank of a ring."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_ds.columns import DOCUMENT_BOUNDS, POSITION_IDS
from megatron_ds.engine import device_type
from megatron_ds.layers.context.ring import ring_attention
from megatron_ds.layers.documents import DocumentLimit, with_document_bounds
from megatron_ds.layers.kernels import AttentionCall
from megatron_ds.layers.kernels.reference import reference_mask
from megatron_ds.parallel.context import ContextParallel, Runs, as_index
from megatron_ds.parallel.grid import Axis, Layout, create_grid
from megatron_ds.parallel.rank_info import RankInfo
from tests.ranks import rank_device

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
