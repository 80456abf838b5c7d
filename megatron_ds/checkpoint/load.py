"""Load the training state of a checkpoint into an engine at any layout."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from megatron_ds.checkpoint.progress import Progress
from megatron_ds.checkpoint.reader import StateReader
from megatron_ds.checkpoint.state import refresh_weights, set_loss_scale, slices
from megatron_ds.checkpoint.state_keys import EMA, MASTER
from megatron_ds.engine import OPTIMIZERS, Engine
from megatron_ds.engine.optimizer_shards import OptimizerShard, optimizer_shards
from megatron_ds.errors import CheckpointError
from megatron_ds.layers.tensor_slices import TensorSlice


def continues_optimizer(reader: StateReader, kinds: Collection[str] | None, name: str, *, resets: bool) -> bool:
    """Return whether a run continues the optimizer state of a checkpoint; else it takes the masters alone.

    Args:
        reader: of the checkpoint.
        kinds: `state_kinds` of the run's optimizer.
        name: its name in the run file.
        resets: whether an optimizer of other state may begin with an empty one: `checkpoint.optimizer: reset`.

    Raises:
        CheckpointError: the optimizers keep different state, and `resets` is false.
    """
    then = reader.optimizer_kinds
    optional = OPTIMIZERS[name].optional_kinds if name in OPTIMIZERS else ()
    if not reader.progress.trained or _fits(then, kinds, optional):
        return True
    if resets:
        return False
    same = [known for known, kind in OPTIMIZERS.items() if _fits(then, kind.state_kinds, kind.optional_kinds)]
    fix = f"optimizer.name={same[0]}, or " if same and same[0] != name else ""
    raise CheckpointError(
        f"optimizer.name={name} keeps {_listed(kinds or ())}, and {reader.directory} has the state of another "
        f"optimizer: {_listed(then)}; try {fix}checkpoint.optimizer=reset, which begins with an empty state"
    )


def _fits(then: Collection[str], kinds: Collection[str] | None, optional: Collection[str]) -> bool:
    return frozenset(kinds or ()) - frozenset(optional) <= frozenset(then) <= frozenset(kinds or ())


def _listed(kinds: Collection[str]) -> str:
    return ", ".join(sorted(kinds)) or "no state"


@torch.no_grad()
def load_state(engine: Engine, reader: StateReader, *, resets_optimizer: bool = False) -> Progress:
    """Load the masters, optimizer state and steps of a checkpoint into a fresh engine. Collective over the world.

    A parameter that was not trained then, and is now, keeps the weights that the engine was filled with, and an empty
    state. An average of the weights that the checkpoint does not have begins with them.

    Args:
        engine: the engine, which has the weights of the checkpoint.
        reader: of the checkpoint.
        resets_optimizer: see `continues_optimizer`.

    Raises:
        CheckpointError: an element is missing; the checkpoint has the state of another optimizer.
    """
    optimizer = engine.optimizer
    name = next((known for known, kind in OPTIMIZERS.items() if kind is type(optimizer)), type(optimizer).__name__)
    kinds = getattr(optimizer, "state_kinds", None)
    continues = continues_optimizer(reader, kinds, name, resets=resets_optimizer)
    trained, axes = set(reader.progress.trained), engine.grid.model_axes
    steps: dict[int, tuple[Tensor, float]] = {}
    for shard in optimizer_shards(engine):
        if shard.name not in trained:
            continue
        for part, views in slices(shard, axes):
            for kind, view in views.items():
                if kind == EMA and not reader.has(EMA, shard.name):
                    view.copy_(views[MASTER])
                elif continues or kind in (MASTER, EMA):
                    _read_into(reader, kind, shard, part, view)
        for kind, full in shard.whole.items() if continues else ():
            full.copy_(reader.read_full(kind, shard.name, tuple(full.shape)))
        if continues and shard.steps is not None:
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
