"""The plans by which optimizers update matrices as a whole, whose elements lie on many ranks of the stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ds.engine.base import Engine
from megatron_ds.engine.group_holdings import group_holdings
from megatron_ds.engine.matrix_exchange import Holding, MatrixExchange
from megatron_ds.engine.optimizers.adafactor import FACTORED, Adafactor, AdafactorPlan, Factors
from megatron_ds.engine.optimizers.muon import MATRICES, MatrixUpdate, Muon
from megatron_ds.engine.tensor_sums import TensorSums, as_matrices
from megatron_ds.layers.param_spec import ParamSpec, spec_of

FlatTensors = Sequence[tuple[Tensor, Mapping[str, Any]]]
"""The tensors that an optimizer updates, each with its parameter group."""


def plan_updates(engine: Engine, flat: FlatTensors) -> None:
    """Give an engine's optimizer the plans of its updates, if it needs any. Collective over the world."""
    if isinstance(engine.optimizer, Muon):
        engine.optimizer.updates = _of_muon(engine, flat)
    elif isinstance(engine.optimizer, Adafactor):
        _plan_adafactor(engine, engine.optimizer, flat)


def _of_muon(engine: Engine, flat: FlatTensors) -> dict[int, MatrixUpdate]:
    found, specs = group_holdings(engine, [one for one in flat if one[1].get(MATRICES)]), _specs(engine)
    return {
        first: MatrixUpdate(MatrixExchange(specs, holdings, found.stage, engine.device), found.places)
        for first, holdings in found.holdings.items()
    }


def _plan_adafactor(engine: Engine, optimizer: Adafactor, flat: FlatTensors) -> None:
    parameters = [parameter for _, parameter in engine.local_parameters()]
    for is_vector in (False, True):
        found = group_holdings(engine, [one for one in flat if bool(one[1].get(FACTORED)) != is_vector])
        specs = {number: as_matrices(spec, is_vector=is_vector) for number, spec in _specs(engine).items()}
        for first, holdings in found.holdings.items():
            known = [[_with_dims(holding, specs) for holding in one] for one in holdings]
            sums, factors = TensorSums(specs, known, found.stage, engine.device), dict[int, Factors]()
            for number in () if is_vector else dict.fromkeys(part.parameter for part in sums.parts):
                shape, device = sums.shapes[number], found.places[number].tensor.device
                rows, columns = torch.zeros(shape[:3]), torch.zeros(shape.matrices, shape.columns)
                factors[number] = Factors(rows.to(device), columns.to(device))
                optimizer.factors[id(parameters[number])] = factors[number]
            optimizer.plans[first] = AdafactorPlan(sums, found.places, factors)


def _with_dims(holding: Holding, specs: Mapping[int, ParamSpec]) -> Holding:
    """Return a holding with a range for each dim that its declaration has more."""
    more = len(specs[holding.parameter].shape) - len(holding.ranges)
    return holding._replace(ranges=(*holding.ranges, *((0, 1),) * more))


def _specs(engine: Engine) -> dict[int, ParamSpec]:
    return {number: spec_of(parameter) for number, (_, parameter) in enumerate(engine.local_parameters())}
