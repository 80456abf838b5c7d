"""What a rank has to write, taken at one moment: training may go on while it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_ds.checkpoint.directory import STATE
from megatron_ds.checkpoint.files import Entry, Piece
from megatron_ds.checkpoint.state import Fragment, owned
from megatron_ds.checkpoint.state_keys import STEPS, key_of
from megatron_ds.checkpoint.tensor_slices import Box
from megatron_ds.checkpoint.weights import AdapterWeights, ModelWeights
from megatron_ds.engine import Engine


class Keep(Protocol):
    """Gives a tensor on CPU, contiguous, with the same values: itself, or a copy under a key."""

    def __call__(self, key: str, tensor: Tensor) -> Tensor: ...


def pass_on(key: str, tensor: Tensor) -> Tensor:
    """No copy where none is needed: the tensor is written before it changes."""
    return tensor.detach().to("cpu").contiguous()


@dataclass
class HostMemory:
    """Copies of tensors, in memory that is used again at the next save.

    Memory that is new to the process costs several times as much as copying. Where there is an accelerator it is
    page-locked, so that copying goes at the bus's full speed.

    Args:
        pinned: whether to lock it.
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
class Part:
    """What this rank writes: the files with their tensors, and the data, in this order.

    `pieces` is taken once, to its end: it may communicate.
    """

    files: Mapping[str, Sequence[Entry]]
    pieces: Iterator[Piece]

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entries in self.files.values() for entry in entries)


def take_part(engine: Engine, weights: ModelWeights | AdapterWeights, keep: Keep) -> Part:
    """This rank's part of a checkpoint of a live model. Collective, and so is taking the pieces."""
    own = list(owned(engine))
    state = list(_state_tensors(own, engine))
    file = f"{STATE}/state-{engine.grid.rank:05d}-of-{engine.grid.layout.world_size:05d}.safetensors"
    files = {**weights.files(), file: [Entry(name, torch.float32, tuple(tensor.shape)) for name, tensor in state]}

    def pieces() -> Iterator[Piece]:
        for weights_file, name, tensor in weights.pieces():
            yield Piece(weights_file, name, keep(f"weights/{name}", tensor))
        for name, tensor in state:
            yield Piece(file, name, keep(name, tensor))

    return Part(files, pieces())


def _state_tensors(own: Sequence[Fragment], engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Names and live views. A parameter's steps are told by who has its first element."""
    axis = engine.grid.tensor
    for fragment in own:
        for box, views in fragment.pieces(axis.rank, axis.size):
            for kind, view in views.items():
                yield key_of(kind, fragment.name, box), view
            if not any(box.start):
                yield key_of(STEPS, fragment.name, Box((), ())), fragment.steps
