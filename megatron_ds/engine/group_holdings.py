"""The parameters that DeepSpeed updates in one call of `step`, and the elements that each rank of the stage holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from megatron_ds.engine.base import Engine
from megatron_ds.engine.matrix_exchange import Holding
from megatron_ds.engine.optimizer_shards import master_ranges
from megatron_ds.engine.optimizers import Place
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.parallel.consensus import gather_objects
from megatron_ds.parallel.grid import Axis, stage_ranks


class GroupHoldings(NamedTuple):
    """Elements by the ranks that hold them. Parameters are known by their index in `Engine.local_parameters`.

    Attributes:
        stage: the ranks of the pipeline stage.
        holdings: id of the first tensor that is updated in a call of `step` -> of each rank, what it holds of the
            parameters that are updated in this call, without padding.
        places: index of a parameter -> the elements that this rank holds.
    """

    stage: Axis
    holdings: Mapping[int, Sequence[Sequence[Holding]]]
    places: Mapping[int, Place]


def group_holdings(engine: Engine, flat: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> GroupHoldings:
    """Return what the ranks of the stage hold. Collective over the world.

    Under ZeRO each flat vector has an entry of its own, because DeepSpeed updates them one after the other; without it
    each parameter group has one.

    Args:
        engine: the engine.
        flat: tensors that its optimizer updates, each with its parameter group.
    """
    stage = stage_ranks(engine.grid)
    updated = [(tensor, group["params"]) for tensor, group in flat]
    first_of = {id(tensor): id(together[0] if together else tensor) for tensor, together in updated}
    firsts = list(dict.fromkeys(first_of.values()))
    numbers = {id(parameter): number for number, (_, parameter) in enumerate(engine.local_parameters())}
    places: dict[int, Place] = {}
    own: list[tuple[int, Holding]] = []
    for _, parameter, found in master_ranges(engine):
        if id(found.flat) not in first_of:
            continue
        number, ranges = numbers[id(parameter)], spec_of(parameter).local_ranges(engine.grid.model_axes)
        lengths = tuple(stop - start for start, stop in ranges)
        assert found.shape[1:] == lengths[1:], (found.shape, ranges)  # padding follows all else in memory
        stop = min(found.start + found.length, prod(lengths))
        if found.start < stop:
            own.append((firsts.index(first_of[id(found.flat)]), Holding(number, ranges, found.start, stop)))
            places[number] = Place(found.flat, found.offset, found.offset + stop - found.start)
    everyone = gather_objects(own, stage.group) if stage.size > 1 else [own]
    holdings = {
        first: [[holding for at, holding in one if at == index] for one in everyone]
        for index, first in enumerate(firsts)
    }
    return GroupHoldings(stage, holdings, places)
