"""The optimizer state that this rank holds in DeepSpeed, and where it lies in the full parameters.

ZeRO flattens a rank's parameters into a few long vectors and cuts those over its shard group. An `OptimizerShard` is
one parameter's range of such a vector: a range of the flattened local shard. `optimizer_shards` finds them at every
stage of ZeRO and without it; as slices of full tensors they mean the same at every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_ds.checkpoint.masters import rounds_to
from megatron_ds.checkpoint.state_keys import KINDS, MASTER
from megatron_ds.checkpoint.tensor_slices import TensorSlice, in_full_tensor, slices_of_range
from megatron_ds.engine import Engine
from megatron_ds.layers.param_spec import ParamSpec, spec_of
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import Axes

_ENDS = 64  # elements compared at each end of a rank's part of a parameter
_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class OptimizerShard:
    """The part of one parameter's optimizer state that this rank holds.

    Attributes:
        name: the parameter's name in the complete model.
        spec: its declaration.
        parameter: the parameter itself.
        shape: the shape of this rank's shard of the parameter.
        start: where the state begins in the flattened shard.
        vectors: kind -> (n,) fp32, live; elements beyond the shard's end are left out.
        steps: () the number of times the optimizer has updated it, live; shared by all parameters in one vector.
    """

    name: str
    spec: ParamSpec
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    vectors: Mapping[str, Tensor]
    steps: Tensor

    def slices(self, axes: Axes) -> Iterator[tuple[TensorSlice, dict[str, Tensor]]]:
        """Yield slices of the full tensor, without padding, each with live views of its elements by kind.

        Args:
            axes: those over which the parameter may be divided.
        """
        begin = 0
        for local in slices_of_range(self.shape, self.start, self.start + len(self.vectors[MASTER])):
            part, end = in_full_tensor(local, self.spec, axes), begin + local.numel
            if part is not None:
                real = tuple(slice(0, length) for length in part.shape)  # padding is at the end of a dim
                views = {kind: one[begin:end].view(local.shape)[real] for kind, one in self.vectors.items()}
                yield part, views
            begin = end


def optimizer_shards(engine: Engine) -> Iterator[OptimizerShard]:
    """Yield this rank's shards of all trained parameters. Without ZeRO all ranks of a replica group yield the same."""
    positions = _positions_in_flat_vectors(engine.deepspeed.optimizer)
    for name, parameter in engine.local_parameters():
        if parameter.requires_grad:
            found = _locate(engine, parameter, positions.get(id(parameter)))
            if found is not None:
                state = engine.optimizer.state[found.flat]
                whole = {MASTER: found.flat.data, **{kind: state[kind] for kind in KINDS[1:]}}
                here = slice(found.offset, found.offset + found.length)
                vectors = {kind: one.view(-1)[here] for kind, one in whole.items()}
                yield OptimizerShard(
                    name, spec_of(parameter), parameter, found.shape, found.start, vectors, state["step"]
                )


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


class _Range(NamedTuple):
    """The fp32 master of a parameter on this rank: `length` elements of `flat` from `offset` on.

    They are those of the flattened local shard from `start` on, which has the shape `shape`.
    """

    shape: tuple[int, ...]
    start: int
    flat: Tensor
    offset: int
    length: int


def _locate(engine: Engine, parameter: Any, position: tuple[int, int] | None) -> _Range | None:
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
        return _Range(tuple(parameter.ds_shape), start, flat, offset, length) if length > 0 else None
    shape = tuple(parameter.shape)
    if position is not None:  # ZeRO-1 and 2: each rank has an equal part of a group's flat vector
        group, begin = position
        part = optimizer.partition_size[group]
        first = shard_rank * part
        start, stop = max(0, first - begin), min(parameter.numel(), first + part - begin)
        flat = inner.param_groups[group]["params"][0]
        return _Range(shape, start, flat, begin + start - first, stop - start) if start < stop else None
    if hasattr(parameter, "_hp_mapping"):  # the same in DeepSpeed's optimizer for bf16 at ZeRO-1
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = inner.param_groups[mapping.param_group_index]["params"][0]
        start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        return _Range(shape, start, flat, mapping.hp_fragment_address.start, length)
    return _Range(shape, 0, parameter, 0, parameter.numel())


def owned_shards(engine: Engine) -> Iterator[OptimizerShard]:
    """Yield the shards that this rank writes; the first of several ranks that hold a shard writes it.

    Collective over pipeline. Tensor ranks hold the same replicated parameters and the same key and value heads,
    pipeline stages the same tied parameters, and replicas the same state if there is no ZeRO.
    """
    grid = engine.grid
    first_here = {name for name, _, _ in engine.inventory()[grid.pipeline.rank]}
    is_copied = engine.deepspeed.zero_optimization_stage() == 0
    for shard in optimizer_shards(engine):
        if is_copied and grid.replica_of(shard.spec).rank > 0:
            continue
        if shard.name in first_here and shard.spec.holds_first(grid.model_axes):
            yield shard


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


@torch.no_grad()
def differing_master(engine: Engine) -> str | None:
    """Return the first parameter on this rank whose live master does not round to its weight; None = all of them do.

    Both ends of this rank's part of every parameter are compared. Not collective.
    """
    for shard in optimizer_shards(engine):
        master, weight = shard.vectors[MASTER], _local_weight(shard)
        for ends in (slice(None, _ENDS), slice(-_ENDS, None)):
            if not rounds_to(master[ends].to(weight.device), weight[ends]):
                return shard.name
    return None


def _local_weight(shard: OptimizerShard) -> Tensor:
    """Return the elements, (n,), of this rank's weight that `shard` has the masters of."""
    parameter: Any = shard.parameter
    length = len(shard.vectors[MASTER])
    if hasattr(parameter, "ds_tensor"):  # under ZeRO-3 the partition begins where the state does
        partition: Tensor = parameter.ds_tensor.data.view(-1)
        return partition[:length]
    return shard.parameter.detach().view(-1)[shard.start : shard.start + length]


@torch.no_grad()
def refresh_weights(engine: Engine) -> None:
    """Set the model's weights from the fp32 masters, after these were written to. Collective over shard."""
    optimizer, stage = engine.deepspeed.optimizer, engine.deepspeed.zero_optimization_stage()
    if stage == 0:
        return
    if stage < 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # small parameters are kept gathered: release those copies
    for shard in optimizer_shards(engine):
        parameter: Any = shard.parameter
        master = shard.vectors[MASTER]
        parameter.ds_tensor.data.view(-1)[: len(master)].copy_(master)
    optimizer.checkpoint_event_epilogue()


def loss_scale(engine: Engine) -> dict[str, float]:
    """Return the state of fp16's dynamic loss scale; empty in other dtypes."""
    scaler = _loss_scaler(engine)
    return {name: getattr(scaler, name) for name in _LOSS_SCALER_STATE} if scaler is not None else {}


def set_loss_scale(engine: Engine, state: Mapping[str, float]) -> None:
    """Restore the state of the loss scale, if this run has one too."""
    scaler = _loss_scaler(engine)
    for name, value in state.items() if scaler is not None else ():
        setattr(scaler, name, value)


def _loss_scaler(engine: Engine) -> Any:
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
