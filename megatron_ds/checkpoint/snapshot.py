"""The data that a rank writes into a checkpoint, taken at one moment: training may continue while it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_ds.checkpoint.directory import STATE
from megatron_ds.checkpoint.files import TensorChunk, TensorHeader
from megatron_ds.checkpoint.state import OptimizerShard, owned_shards
from megatron_ds.checkpoint.state_keys import STEPS, key_of
from megatron_ds.checkpoint.tensor_slices import TensorSlice
from megatron_ds.checkpoint.weights import AdapterWriter, ModelWriter
from megatron_ds.engine import Engine
from megatron_ds.parallel.grid import Axes


class CopyToHost(Protocol):
    """Function that returns a tensor on CPU, contiguous, with the same values: the tensor itself, or a copy of it."""

    def __call__(self, key: str, tensor: Tensor) -> Tensor: ...


def without_copy(key: str, tensor: Tensor) -> Tensor:
    """Return the tensor itself if it is on CPU and contiguous: it is written before it changes."""
    return tensor.detach().to("cpu").contiguous()


@dataclass
class HostMemory:
    """Copies of tensors, in memory that the next save uses again.

    Memory that is new to the process costs several times as much as copying. With an accelerator it is page-locked, so
    that copying runs at the bus's full speed.

    Args:
        pinned: whether to page-lock it.
    """

    pinned: bool
    _places: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, key: str, tensor: Tensor) -> Tensor:
        place = self._places.get(key)
        if place is None or place.shape != tensor.shape or place.dtype != tensor.dtype:
            place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.pinned)
            self._places[key] = place
        return place.copy_(tensor.detach())

    @property
    def bytes(self) -> int:
        return sum(place.numel() * place.element_size() for place in self._places.values())


@dataclass(frozen=True)
class RankFiles:
    """The files that this rank writes, with the headers of their tensors, and the data in the same order.

    `chunks` is iterated once, to its end: it may communicate.
    """

    files: Mapping[str, Sequence[TensorHeader]]
    chunks: Iterator[TensorChunk]

    @property
    def bytes(self) -> int:
        return sum(header.bytes for headers in self.files.values() for header in headers)


def take_snapshot(engine: Engine, weights: ModelWriter | AdapterWriter, copy: CopyToHost) -> RankFiles:
    """Return this rank's files of a checkpoint. Collective over the world, and so is iterating over the chunks."""
    state = list(_state_tensors(list(owned_shards(engine)), engine.grid.model_axes))
    file = f"{STATE}/state-{engine.grid.rank:05d}-of-{engine.grid.layout.world_size:05d}.safetensors"
    headers = [TensorHeader(name, torch.float32, tuple(tensor.shape)) for name, tensor in state]

    def chunks() -> Iterator[TensorChunk]:
        for weights_file, name, tensor in weights.chunks():
            yield TensorChunk(weights_file, name, copy(f"weights/{name}", tensor))
        for name, tensor in state:
            yield TensorChunk(file, name, copy(name, tensor))

    return RankFiles({**weights.files(), file: headers}, chunks())


def _state_tensors(shards: Sequence[OptimizerShard], axes: Axes) -> Iterator[tuple[str, Tensor]]:
    """Yield names and live views. The rank with a parameter's first element writes its number of steps."""
    for shard in shards:
        for part, views in shard.slices(axes):
            for kind, view in views.items():
                yield key_of(kind, shard.name, part), view
            if not any(part.start):
                yield key_of(STEPS, shard.name, TensorSlice((), ())), shard.steps
