"""The optimizer state that this rank holds in DeepSpeed, and where it lies in the parameters' shards.

ZeRO flattens a rank's parameters into a few long vectors and cuts those over its shard group. An `OptimizerShard` is
one parameter's range of such a vector: a range of the flattened local shard. `optimizer_shards` finds them at every
stage of ZeRO and without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_ds.engine.base import Engine
from megatron_ds.engine.optimizers import STEPS, GuardedOptimizer
from megatron_ds.layers.param_spec import ParamSpec, spec_of
from megatron_ds.parallel.collectives import all_reduce_


@dataclass(frozen=True)
class OptimizerShard:
    """The part of one parameter's optimizer state that this rank holds.

    Attributes:
        name: the parameter's name in the complete model.
        spec: its declaration.
        parameter: the parameter itself.
        shape: the shape of this rank's shard of the parameter.
        start: where the state begins in the flattened shard.
        master: (n,) fp32, the weights, live; elements beyond the shard's end are left out.
        moments: name in the optimizer's state -> (n,) fp32, live, such as AdamW's `exp_avg` and `exp_avg_sq`.
        steps: () the number of times the optimizer has updated it, live; shared by all parameters in one vector. None =
            the optimizer does not count them.
        whole: name -> state of the full parameter, fp32, live; see `GuardedOptimizer.whole_state`.
    """

    name: str
    spec: ParamSpec
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    master: Tensor
    moments: Mapping[str, Tensor]
    steps: Tensor | None
    whole: Mapping[str, Tensor]


def optimizer_shards(engine: Engine) -> Iterator[OptimizerShard]:
    """Yield this rank's shards of all trained parameters. Without ZeRO all ranks of a replica group yield the same."""
    for name, parameter, found in master_ranges(engine):
        state = engine.optimizer.state[found.flat]
        here = slice(found.offset, found.offset + found.length)
        moments = {kind: one.view(-1)[here] for kind, one in state.items() if kind != STEPS}
        master, steps = found.flat.data.view(-1)[here], state.get(STEPS)
        whole = engine.optimizer.whole_state(parameter) if isinstance(engine.optimizer, GuardedOptimizer) else {}
        spec = spec_of(parameter)
        yield OptimizerShard(name, spec, parameter, found.shape, found.start, master, moments, steps, whole)


def master_ranges(engine: Engine) -> Iterator[tuple[str, nn.Parameter, MasterRange]]:
    """Yield name, parameter and place of the master of each trained parameter that this rank has a part of."""
    positions = _positions_in_flat_vectors(engine.deepspeed.optimizer)
    for name, parameter in engine.local_parameters():
        if parameter.requires_grad:
            found = _locate(engine, parameter, positions.get(id(parameter)))
            if found is not None:
                yield name, parameter, found


def _positions_in_flat_vectors(optimizer: Any) -> dict[int, tuple[int, int]]:
    """Return id of a parameter -> (its group, where it begins in the group's flat vector), under ZeRO-1 and 2.

    `_hp_mapping` is no source for them: it takes parameters to lie in the order of their group, and DeepSpeed's
    `round_robin_gradients` deals them out to the ranks in turn. The other optimizers, without it, have no such tables.
    """
    groups: Any = getattr(optimizer, "round_robin_bit16_groups", ())
    offsets: Any = getattr(optimizer, "round_robin_bit16_offsets", ())
    return {
        id(parameter): (group, offset)
        for group, (parameters, begins) in enumerate(zip(groups, offsets, strict=True))
        for parameter, offset in zip(parameters, begins, strict=True)
    }


class MasterRange(NamedTuple):
    """The fp32 master of a parameter on this rank: `length` elements of `flat` from `offset` on.

    They are those of the flattened local shard from `start` on, which has the shape `shape`. `flat` is the tensor that
    the optimizer updates.
    """

    shape: tuple[int, ...]
    start: int
    flat: Tensor
    offset: int
    length: int


def _locate(engine: Engine, parameter: Any, position: tuple[int, int] | None) -> MasterRange | None:
    """Return the place of a parameter's master; None if this rank has none of it.

    Args:
        engine: the live engine.
        parameter: one of its parameters.
        position: from `_positions_in_flat_vectors`, if it is there.
    """
    optimizer, inner = engine.deepspeed.optimizer, engine.optimizer
    shard_rank = engine.grid.shard_of(spec_of(parameter)).rank
    if hasattr(parameter, "ds_id"):  # ZeRO-3: each rank has an equal part of each parameter, the last ones padded
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = shard_rank * length
        length = min(length, parameter.ds_numel - start)
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return MasterRange(tuple(parameter.ds_shape), start, flat, offset, length) if length > 0 else None
    shape = tuple(parameter.shape)
    if position is not None:  # ZeRO-1 and 2: each rank has an equal part of a group's flat vector
        group, begin = position
        part = optimizer.partition_size[group]
        first = shard_rank * part
        start, stop = max(0, first - begin), min(parameter.numel(), first + part - begin)
        flat = inner.param_groups[group]["params"][0]
        return MasterRange(shape, start, flat, begin + start - first, stop - start) if start < stop else None
    if hasattr(parameter, "_hp_mapping"):  # the same in DeepSpeed's optimizer for bf16 at ZeRO-1
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = inner.param_groups[mapping.param_group_index]["params"][0]
        start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        return MasterRange(shape, start, flat, mapping.hp_fragment_address.start, length)
    return MasterRange(shape, 0, parameter, 0, parameter.numel())


@torch.no_grad()
def master_shard(engine: Engine, parameter: Any) -> Tensor:
    """Return this rank's shard of a trained parameter's fp32 master, padding included. Collective over shard.

    The parts of the ranks are summed as integers, which keeps every bit.
    """
    found = _locate(engine, parameter, _positions_in_flat_vectors(engine.deepspeed.optimizer).get(id(parameter)))
    shape = found.shape if found is not None else tuple(getattr(parameter, "ds_shape", parameter.shape))
    shard = torch.zeros(prod(shape), dtype=torch.float32, device=engine.device)
    if found is not None:
        own = found.flat.detach().view(-1)[found.offset : found.offset + found.length]
        shard[found.start : found.start + found.length] = own
    if engine.deepspeed.zero_optimization_stage() > 0:
        all_reduce_(shard.view(torch.int32), engine.grid.shard_of(spec_of(parameter)))
    return shard.view(shape)
