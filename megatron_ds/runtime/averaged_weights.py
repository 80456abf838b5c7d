"""The model with the average of its weights instead of the last ones, such as for an export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_ds.checkpoint.state import refresh_weights
from megatron_ds.checkpoint.state_keys import EMA
from megatron_ds.engine import Engine
from megatron_ds.engine.optimizer_shards import optimizer_shards


@contextmanager
def averaged_weights(engine: Engine) -> Iterator[None]:
    """Exchange weights and averages within the block. Collective over the world, at its beginning and its end.

    After an exception they stay exchanged, because other ranks may not reach the end. No checkpoint may be written
    within the block, nor be incomplete when it begins.
    """
    _exchange(engine)
    yield
    _exchange(engine)


@torch.no_grad()
def _exchange(engine: Engine) -> None:
    for shard in optimizer_shards(engine):
        average = shard.moments[EMA]
        weights = shard.master.clone()
        shard.master.copy_(average)
        average.copy_(weights)
    refresh_weights(engine)
