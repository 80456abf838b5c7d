"""Continuation of rows by a module: attention layers keep keys and values, and the head predicts one position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from megatron_ds.layers.key_value_cache import Continuation, KeyValueCache, SourceCache
from megatron_ds.models.block import Block
from megatron_ds.models.embedding_and_head import LanguageModelHead


@contextmanager
def continuing(module: nn.Module, capacity: int) -> Iterator[Continuation]:
    """Have the causal attention layers of a module keep keys and values within the block, and its head pick the last
    position. The module computes without dropout meanwhile.

    Args:
        module: a model, or a pipeline stage of one.
        capacity: the most positions of a row.
    """
    rows = Continuation(capacity)
    was_training = module.training
    module.eval()
    with predicting(module, -1):
        for block in _blocks(module):
            if block.attention.shape.causal:
                block.attention.cache = KeyValueCache(rows, block.attention.shape.window)
            if block.cross is not None:
                block.cross.cache = SourceCache()
        try:
            yield rows
        finally:
            for block in _blocks(module):
                block.attention.cache = None
                if block.cross is not None:
                    block.cross.cache = None
            module.train(was_training)


@contextmanager
def predicting(module: nn.Module, position: int | Tensor) -> Iterator[None]:
    """Have a module's head return the logits of one position alone, or of one of each row, (B,), within the block."""
    heads = [part for part in module.modules() if isinstance(part, LanguageModelHead)]
    for head in heads:
        head.picked = position
    try:
        yield
    finally:
        for head in heads:
            head.picked = None


def _blocks(module: nn.Module) -> list[Block]:
    return [part for part in module.modules() if isinstance(part, Block)]
