"""Put a run where it stood, at whatever layout."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ds.checkpoint.progress import Progress
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.checkpoint.state import Fragment, fragments, refresh_weights, set_loss_scale
from megatron_ds.checkpoint.state_keys import KINDS
from megatron_ds.checkpoint.tensor_slices import Box
from megatron_ds.engine import Engine


@torch.no_grad()
def load_state(engine: Engine, reader: StateReader) -> Progress:
    """Give a fresh engine the masters, moments and steps of a checkpoint, at any layout. Collective.

    A parameter that was not trained then, and is now, keeps the weights that the engine was filled with, without
    moments.

    Raises:
        CheckpointError: an element is missing.
    """
    trained, axis = set(reader.progress.trained), engine.grid.tensor
    steps: dict[int, tuple[Tensor, float]] = {}
    for fragment in fragments(engine):
        if fragment.name not in trained:
            continue
        for box, views in fragment.pieces(axis.rank, axis.size):
            for kind in KINDS:
                _read_into(reader, kind, fragment, box, views[kind])
        known = steps.get(id(fragment.steps), (fragment.steps, 0.0))[1]
        steps[id(fragment.steps)] = fragment.steps, max(known, reader.steps(fragment.name))
    for counter, value in steps.values():
        counter.fill_(value)
    refresh_weights(engine)
    set_loss_scale(engine, reader.progress.loss_scale)
    engine.steps_begun = reader.progress.step
    return reader.progress


def _read_into(reader: StateReader, kind: str, fragment: Fragment, box: Box, view: Tensor) -> None:
    if view.device.type == "cpu":
        reader.read(kind, fragment.name, box, view)
        return
    host = torch.empty(view.shape, dtype=view.dtype)
    reader.read(kind, fragment.name, box, host)
    view.copy_(host)
