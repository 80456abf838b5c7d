"""Partition of a list of layers into contiguous pipeline stages of balanced cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from megatron_ds.errors import TopologyError
from megatron_ds.models.sequential import LayerSpec


def partition(specs: Sequence[LayerSpec], num_parts: int) -> list[int]:
    """Return the bounds of `num_parts` contiguous parts with the smallest possible largest cost.

    Every part except the first begins with a block, because a pipeline stage without own parameters hangs ZeRO. Layers
    before the first block stay with that block, layers after the last block with the last one, and layers between two
    stacks with the first stack. Among equal choices the earlier parts get more, since the last also has the head.

    Returns:
        num_parts + 1 indices into `specs`, first 0, last len(specs).

    Raises:
        TopologyError: fewer blocks than parts.
    """
    blocks = [index for index, spec in enumerate(specs) if spec.is_block]
    if num_parts > len(blocks):
        raise TopologyError(
            f"parallel.pipeline={num_parts} exceeds the model's {len(blocks)} layers; nearest: {len(blocks)}"
        )
    ends = [*blocks[1:], len(specs)]
    costs = [sum(spec.cost for spec in specs[start:end]) for start, end in zip(blocks, ends)]
    costs[0] += sum(spec.cost for spec in specs[: blocks[0]])
    cuts = _balanced_cuts(tuple(costs), num_parts)
    return [0, *(blocks[cut] for cut in cuts), len(specs)]


@cache
def _balanced_cuts(costs: tuple[float, ...], num_parts: int) -> tuple[int, ...]:
    """Return the first block of parts 1.., minimizing the largest part (linear partition by dynamic programming)."""
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[p][i]: smallest largest cost of the first i blocks in p parts; begin[p][i]: where the last of them begins.
    infinity = float("inf")
    best = [[infinity] * (count + 1) for _ in range(num_parts + 1)]
    begin = [[0] * (count + 1) for _ in range(num_parts + 1)]
    best[0][0] = 0.0
    for parts in range(1, num_parts + 1):
        for end in range(parts, count + 1):
            for start in range(end - 1, parts - 2, -1):
                worst = max(best[parts - 1][start], sums[end] - sums[start])
                if worst < best[parts][end]:
                    best[parts][end], begin[parts][end] = worst, start
    cuts: list[int] = []
    end = count
    for parts in range(num_parts, 1, -1):
        end = begin[parts][end]
        cuts.append(end)
    return tuple(reversed(cuts))
