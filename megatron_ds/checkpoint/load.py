"""Load the training state of a checkpoint into an engine at any layout."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ds.checkpoint.progress import Progress
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.checkpoint.state import refresh_weights, set_loss_scale, slices
from megatron_ds.checkpoint.state_keys import KINDS
from megatron_ds.checkpoint.tensor_slices import TensorSlice
from megatron_ds.engine import Engine
from megatron_ds.engine.optimizer_shards import OptimizerShard, optimizer_shards


@torch.no_grad()
def load_state(engine: Engine, reader: StateReader) -> Progress:
    """Load the masters, moments and steps of a checkpoint into a fresh engine. Collective over the world.

    A parameter that was not trained then, and is now, keeps the weights that the engine was filled with, without
    moments.

    Raises:
        CheckpointError: an element is missing.
    """
    trained, axes = set(reader.progress.trained), engine.grid.model_axes
    steps: dict[int, tuple[Tensor, float]] = {}
    for shard in optimizer_shards(engine):
        if shard.name not in trained:
            continue
        for part, views in slices(shard, axes):
            for kind in KINDS:
                _read_into(reader, kind, shard, part, views[kind])
        known = steps.get(id(shard.steps), (shard.steps, 0.0))[1]
        steps[id(shard.steps)] = shard.steps, max(known, reader.steps(shard.name))
    for counter, value in steps.values():
        counter.fill_(value)
    refresh_weights(engine)
    set_loss_scale(engine, reader.progress.loss_scale)
    engine.steps_begun = reader.progress.step
    return reader.progress


def _read_into(reader: StateReader, kind: str, shard: OptimizerShard, part: TensorSlice, view: Tensor) -> None:
    if view.device.type == "cpu":
        reader.read(kind, shard.name, part, view)
        return
    host = torch.empty(view.shape, dtype=view.dtype)
    reader.read(kind, shard.name, part, host)
    view.copy_(host)
