"""The optimizer state of this rank as slices of full tensors, which mean the same at every layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_ds.checkpoint.masters import rounds_to
from megatron_ds.checkpoint.state_keys import MASTER
from megatron_ds.engine import Engine
from megatron_ds.engine.optimizer_shards import OptimizerShard, optimizer_shards
from megatron_ds.layers.tensor_slices import TensorSlice, in_full_tensor, slices_of_range
from megatron_ds.parallel.grid import Axes

_ENDS = 64  # elements compared at each end of a rank's part of a parameter
_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def slices(shard: OptimizerShard, axes: Axes) -> Iterator[tuple[TensorSlice, dict[str, Tensor]]]:
    """Yield slices of the full tensor, without padding, each with live views of its elements by kind.

    Args:
        shard: one parameter's state on this rank.
        axes: those over which the parameter may be divided.
    """
    begin = 0
    vectors = {MASTER: shard.master, **shard.moments}
    for local in slices_of_range(shard.shape, shard.start, shard.start + len(shard.master)):
        part, end = in_full_tensor(local, shard.spec, axes), begin + local.numel
        if part is not None:
            real = tuple(slice(0, length) for length in part.shape)  # padding is at the end of a dim
            views = {kind: one[begin:end].view(local.shape)[real] for kind, one in vectors.items()}
            yield part, views
        begin = end


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
def differing_master(engine: Engine) -> str | None:
    """Return the first parameter on this rank whose live master does not round to its weight; None = all of them do.

    Both ends of this rank's part of every parameter are compared. Not collective.
    """
    for shard in optimizer_shards(engine):
        master, weight = shard.master, _local_weight(shard)
        for ends in (slice(None, _ENDS), slice(-_ENDS, None)):
            if not rounds_to(master[ends].to(weight.device), weight[ends]):
                return shard.name
    return None


def _local_weight(shard: OptimizerShard) -> Tensor:
    """Return the elements, (n,), of this rank's weight that `shard` has the masters of."""
    parameter: Any = shard.parameter
    length = len(shard.master)
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
        master = shard.master
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
