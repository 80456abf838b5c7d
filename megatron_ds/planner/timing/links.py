"""Seconds of collectives and messages on a network: steps of rings and trees, inside islands and between them.

A ring of n ranks on N islands crosses NICs in N - 1 of its n - 1 steps (twice as many for an all-reduce). Chunks
flow through all steps at once, so that the slower of the two links limits the bandwidth. Where both are about equally
fast they disturb each other: 4 nodes of 8 H100 reach 320 GB/s where NVLink alone allows 370 and their NICs 372
(NCCL issue 1221), and 3 nodes of 8 A100 reach 96 of the 100 GB/s of their NICs (nccl-tests issue 119). `_joined` fits
both. An all-reduce over many islands takes the faster of ring and tree, as NCCL chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache
from math import ceil, log2

from megatron_ds.planner.operations import Collective, Message, Work
from megatron_ds.planner.profiles.link import GB, US, Link
from megatron_ds.planner.profiles.network import Network
from megatron_ds.planner.timing.measured_times import Curve
from megatron_ds.planner.timing.placement import Placement

TREE_SHARE = 0.92
"""Bandwidth of NCCL's trees relative to its rings (NVIDIA/nccl, src/graph/tuning.cc)."""
_SHARPNESS = 4


@lru_cache(maxsize=1 << 16)
def seconds(operation: Collective | Message, placement: Placement, network: Network) -> float:
    """Return the seconds of a collective or a message that nothing else delays.

    Args:
        operation: what is sent.
        placement: of the ranks of its axis. A message crosses islands if they are on several, and a collective of
            fewer ranks than the axis counts as one of all of them.
        network: the links.
    """
    kind = operation.kind if isinstance(operation, Collective) else "message"
    if isinstance(operation, Collective):
        if operation.ranks == 1 or operation.num_bytes == 0:
            return 0.0
        placement = replace(placement, ranks=operation.ranks)
    curves = _curves(network.inside if placement.islands == 1 else network.outside)
    by_ranks = curves.get((kind, operation.axis)) or curves.get((kind, None))
    if by_ranks is None:
        return _by_formula(kind, operation.num_bytes, placement, network)
    if isinstance(operation, Message):
        return next(iter(by_ranks.values())).seconds(operation.num_bytes)
    nearest = min(by_ranks, key=lambda ranks: abs(log2(ranks / operation.ranks)))
    time_s = by_ranks[nearest].seconds(operation.num_bytes)
    if nearest == operation.ranks:
        return time_s
    same = replace(placement, ranks=nearest, per_island=min(nearest, placement.per_island))
    scale = _by_formula(kind, operation.num_bytes, placement, network)
    return time_s * scale / _by_formula(kind, operation.num_bytes, same, network)


@cache
def _curves(link: Link) -> dict[tuple[str, str | None], dict[int, Curve]]:
    """Return the measured times of a link: (kind, axis) -> ranks -> curve over bytes."""
    points: dict[tuple[str, str | None], dict[int, list[tuple[float, float]]]] = {}
    for row in link.measured:
        by_ranks = points.setdefault((row.kind, row.axis), {})
        by_ranks.setdefault(row.ranks, []).append((row.num_bytes, row.us * US))
    return {key: {ranks: Curve.through(rows) for ranks, rows in found.items()} for key, found in points.items()}


def communication_seconds(
    work: Work, placements: Mapping[str, Placement], network: Network
) -> dict[tuple[str, bool], float]:
    """Return the seconds of all collectives and messages of some work, by axis and `hidden`; see `seconds`."""
    found: dict[tuple[str, bool], float] = {}
    for one, count in work.items():
        if isinstance(one, Collective | Message):
            key = one.axis, one.hidden
            found[key] = found.get(key, 0.0) + count * seconds(one, placements[one.axis], network)
    return found


def _by_formula(kind: str, num_bytes: int, placement: Placement, network: Network) -> float:
    if kind == "message":
        return _message_s(num_bytes, network.inside if placement.islands == 1 else network.outside)
    if kind == "all_to_all":
        return _all_to_all_s(num_bytes, placement, network)
    if kind == "broadcast":
        return _broadcast_s(num_bytes, placement, network)
    ring_s = _ring_s(2 if kind == "all_reduce" else 1, num_bytes, placement, network)
    if kind != "all_reduce":
        return ring_s
    summing = network.inside.summing
    if placement.islands > 1:
        return min(ring_s, _tree_s(num_bytes, placement, network)) if network.outside.has_trees else ring_s
    return min(ring_s, summing.base_us * US + summing.step_s(num_bytes)) if summing is not None else ring_s


def _message_s(num_bytes: int, link: Link) -> float:
    steps = link.message or link.ring
    return steps.base_us * US + steps.step_s(num_bytes)


def _ring_s(phases: int, num_bytes: int, placement: Placement, network: Network) -> float:
    """Return the seconds of `phases` times around a ring; each step waits for the chunk before it."""
    chunk = num_bytes / placement.ranks
    inside, outside = network.inside.ring, network.outside.ring
    crossing = placement.islands - 1
    latency_s = crossing * outside.latency_s(chunk) + (placement.ranks - 1 - crossing) * inside.latency_s(chunk)
    moved_s = (placement.ranks - 1) * chunk / _bandwidth(placement, network)
    base_us = inside.base_us if crossing == 0 else outside.base_us
    return base_us * US + phases * (latency_s + moved_s)


def _tree_s(num_bytes: int, placement: Placement, network: Network) -> float:
    """Return the seconds of an all-reduce up and down a tree of islands, whose devices form a chain."""
    inside, outside = network.inside.ring, network.outside.ring
    hops_s = (placement.per_island - 1) * inside.latency_s(num_bytes)
    hops_s += ceil(log2(placement.islands)) * outside.latency_s(num_bytes)
    sent = 2 * (placement.ranks - 1) / placement.ranks * num_bytes
    return outside.base_us * US + 2 * hops_s + sent / (TREE_SHARE * _bandwidth(placement, network))


def _broadcast_s(num_bytes: int, placement: Placement, network: Network) -> float:
    """Return the seconds of a buffer that flows once around a ring."""
    inside, outside = network.inside.ring, network.outside.ring
    crossing = placement.islands - 1
    hops_s = crossing * outside.latency_s(0) + (placement.ranks - 1 - crossing) * inside.latency_s(0)
    return (
        (inside.base_us if crossing == 0 else outside.base_us) * US
        + hops_s
        + num_bytes / _bandwidth(placement, network)
    )


def _all_to_all_s(num_bytes: int, placement: Placement, network: Network) -> float:
    """Return the seconds of messages from every rank to every other one; both links work at the same time."""
    near, each = placement.per_island - 1 if placement.islands > 1 else placement.ranks - 1, num_bytes / placement.ranks
    far = placement.ranks - 1 - near
    inside, outside = network.inside.ring, network.outside.ring
    near_s = near * (inside.step_us * US + each / (inside.gb_s * GB)) + (inside.fill_us * US if near else 0)
    far_s = far * (outside.step_us * US + each / (outside.gb_s * GB)) + (outside.fill_us * US if far else 0)
    return (outside if far else inside).base_us * US + max(near_s, far_s)


def _bandwidth(placement: Placement, network: Network) -> float:
    """Return the bytes per second of one rank in a ring."""
    inside, outside = network.inside.ring.gb_s * GB, network.outside.ring.gb_s * GB * placement.per_island
    if placement.islands == 1:
        return inside
    return outside if placement.per_island == 1 else _joined(inside, outside)


def _joined(one: float, other: float) -> float:
    return float((one**-_SHARPNESS + other**-_SHARPNESS) ** (-1 / _SHARPNESS))
