"""The plans by which Muon updates the matrices of an engine: where their elements lie on all ranks of the stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_ds.engine.base import Engine
from megatron_ds.engine.matrix_exchange import Holding, MatrixExchange
from megatron_ds.engine.optimizer_shards import master_ranges
from megatron_ds.engine.optimizers.muon import MATRICES, MatrixUpdate, Place
from megatron_ds.layers.param_spec import spec_of
from megatron_ds.parallel.consensus import gather_objects
from megatron_ds.parallel.grid import stage_ranks


def matrix_updates(engine: Engine, flat: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> dict[int, MatrixUpdate]:
    """Return the plans of an engine's optimizer; see `Muon.updates`. Collective over the world.

    Under ZeRO each flat vector has a plan of its own, because DeepSpeed updates them one after the other; without it
    each parameter group has one.

    Args:
        engine: the engine.
        flat: the tensors that its optimizer updates, each with its parameter group.
    """
    stage = stage_ranks(engine.grid)
    of_matrices = [(tensor, group["params"]) for tensor, group in flat if group.get(MATRICES)]
    first_of = {id(tensor): id(together[0] if together else tensor) for tensor, together in of_matrices}
    firsts = list(dict.fromkeys(first_of.values()))
    specs, places = dict(enumerate(spec_of(one) for _, one in engine.local_parameters())), dict[int, Place]()
    own: list[tuple[int, Holding]] = []
    numbers = {id(parameter): number for number, (_, parameter) in enumerate(engine.local_parameters())}
    for _, parameter, found in master_ranges(engine):
        if id(found.flat) in first_of:
            number, ranges = numbers[id(parameter)], specs[numbers[id(parameter)]].local_ranges(engine.grid.model_axes)
            assert found.shape == tuple(stop - start for start, stop in ranges), (found.shape, ranges)
            holding = Holding(number, ranges, found.start, found.start + found.length)
            own.append((firsts.index(first_of[id(found.flat)]), holding))
            places[number] = Place(found.flat, found.offset, found.offset + found.length)
    everyone = gather_objects(own, stage.group) if stage.size > 1 else [own]
    updates = {}
    for index, first in enumerate(firsts):
        holdings = [[holding for at, holding in one if at == index] for one in everyone]
        updates[first] = MatrixUpdate(MatrixExchange(specs, holdings, stage, engine.device), places)
    return updates
