"""Muon's exchanges of matrices, as the engine plans them, for ranks that need not exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from megatron_ds.engine.matrix_exchange import Holding, MatrixExchange
from megatron_ds.layers.param_spec import ParamSpec
from megatron_ds.parallel.grid import EXPERT, Axes, Axis
from megatron_ds.planner.held_parameters import HeldParameter, HeldStage, num_elements
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.traffic.gradients import shard_ranks
from megatron_ds.planner.weight_schedule import divided_numel
from megatron_ds.planner.zero_settings import ZeroSettings, padded

DTYPE_BYTES: Mapping[str, int] = {"bf16": 2, "fp32": 4}
"""Bytes of an element that is exchanged, by the optimizer's option `ns_dtype`."""

MOST_HOLDINGS = 200_000
"""Ranges of parameters on the ranks of a stage, beyond which exchanges are not planned one by one."""


def stage_ranks(given: PlanInput) -> int:
    """Return the number of ranks of a pipeline stage."""
    return given.layout.world_size // given.layout.pipeline


def matrix_exchange(
    given: PlanInput, held: HeldStage, zero: ZeroSettings, parameters: Sequence[HeldParameter]
) -> MatrixExchange | None:
    """Return the exchange of the matrices that one step updates, as the first rank sees it.

    Args:
        given, held, zero: the run, the stage, and DeepSpeed's settings.
        parameters: all of a parameter group; at ZeRO-3, of a sub-group.

    Returns:
        None if there are more holdings than `MOST_HOLDINGS`.
    """
    ranks = stage_ranks(given)
    if ranks * len(parameters) > MOST_HOLDINGS:
        return None
    numbers = {one.name: number for number, one in enumerate(held.parameters)}
    specs: dict[int, ParamSpec] = {numbers[one.name]: one.spec for one in parameters}
    holdings = [_holdings(given, zero, rank, parameters, numbers) for rank in range(ranks)]
    return MatrixExchange(specs, holdings, Axis(ranks, 0, tuple(range(ranks))), torch.device("meta"))


def _holdings(
    given: PlanInput,
    zero: ZeroSettings,
    rank: int,
    parameters: Sequence[HeldParameter],
    numbers: Mapping[str, int],
) -> list[Holding]:
    """Return the ranges of parameters whose master weights a rank of the stage has; see `engine.group_holdings`."""
    shard, tensor = divmod(rank, given.layout.tensor)
    axes: Axes = {
        "tensor": Axis(given.layout.tensor, tensor),
        EXPERT: Axis(given.expert_ranks, rank % given.expert_ranks),
    }
    found, begin = [], 0
    for one in parameters:
        ranges = one.spec.local_ranges(axes)
        ranks, own = shard_ranks(given, apart=one.apart), rank // given.expert_ranks if one.apart else shard
        if zero.stage == 0:
            start, stop = 0, one.numel
        elif zero.stage == 3:
            part = divided_numel(one, ranks) // ranks
            start, stop = own * part, min((own + 1) * part, one.numel)
        else:
            part = padded(num_elements(parameters), ranks) // ranks
            start, stop = max(0, own * part - begin), min(one.numel, (own + 1) * part - begin)
        begin += one.numel
        stop = min(stop, prod(last - first for first, last in ranges))
        if start < stop:
            found.append(Holding(numbers[one.name], ranges, start, stop))
    return found
