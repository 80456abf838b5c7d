"""The data that a rank writes into a checkpoint, taken at one moment: training may continue while it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.checkpoint.directory import STATE
from megatron_ds.checkpoint.files import TensorChunk, TensorHeader
from megatron_ds.checkpoint.snapshot_memory import HostMemory
from megatron_ds.checkpoint.state import owned_shards, slices
from megatron_ds.checkpoint.state_keys import STEPS, key_of
from megatron_ds.checkpoint.weights import AdapterWriter, ModelWriter
from megatron_ds.engine import Engine
from megatron_ds.engine.optimizer_shards import OptimizerShard
from megatron_ds.layers.tensor_slices import full_slice
from megatron_ds.parallel.grid import Axes


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


@dataclass(frozen=True)
class SnapshotPlan:
    """The tensors that this rank writes, live.

    Attributes:
        files: path of each file -> headers of its tensors.
        state_file: the one of the optimizer state.
        state: names and live views of its tensors.
    """

    files: Mapping[str, Sequence[TensorHeader]]
    state_file: str
    state: Sequence[tuple[str, Tensor]]

    @property
    def headers(self) -> list[TensorHeader]:
        """Headers of all tensors."""
        return [header for headers in self.files.values() for header in headers]


def plan_snapshot(engine: Engine, weights: ModelWriter | AdapterWriter) -> SnapshotPlan:
    """Return the tensors that this rank writes into a checkpoint. Collective over pipeline."""
    state = list(_state_tensors(list(owned_shards(engine)), engine.grid.model_axes))
    file = f"{STATE}/state-{engine.grid.rank:05d}-of-{engine.grid.layout.world_size:05d}.safetensors"
    headers = [TensorHeader(name, torch.float32, tuple(tensor.shape)) for name, tensor in state]
    return SnapshotPlan({**weights.files(), file: headers}, file, state)


def take_snapshot(engine: Engine, weights: ModelWriter | AdapterWriter, memory: HostMemory | None) -> RankFiles:
    """Return this rank's files of a checkpoint. Collective over the world, and so is iterating over the chunks.

    Args:
        engine: the live engine.
        weights: writer of its weights.
        memory: the place of copies, after which training may continue; None = tensors are written before they change,
            those on the host without a copy.
    """
    plan = plan_snapshot(engine, weights)
    if memory is not None:
        memory.reserve(plan.headers)

    def on_host(tensor: Tensor, *, is_temporary: bool) -> Tensor:
        if memory is not None:
            return memory.copy(tensor, is_temporary=is_temporary)
        return tensor.detach().to("cpu").contiguous()

    def chunks() -> Iterator[TensorChunk]:
        for file, name, tensor in weights.chunks(keeps_values=memory is not None and memory.is_deferred):
            yield TensorChunk(file, name, on_host(tensor, is_temporary=True))
        for name, tensor in plan.state:
            yield TensorChunk(plan.state_file, name, on_host(tensor, is_temporary=False))

    return RankFiles(plan.files, chunks())


def _state_tensors(shards: Sequence[OptimizerShard], axes: Axes) -> Iterator[tuple[str, Tensor]]:
    """Yield names and live views. The rank with a parameter's first element writes steps and state of the whole."""
    for shard in shards:
        for part, views in slices(shard, axes):
            for kind, view in views.items():
                yield key_of(kind, shard.name, part), view
            if any(part.start):
                continue
            for kind, full in (shard.whole if shard.steps is None else {STEPS: shard.steps, **shard.whole}).items():
                yield key_of(kind, shard.name, full_slice(tuple(full.shape))), full
