"""Find the newest intact checkpoint, and read the training state of a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ds.checkpoint.directory import PROGRESS, STATE, checkpoints_in, is_checkpoint, read_manifest
from megatron_ds.checkpoint.files import FileRecord, damage
from megatron_ds.checkpoint.progress import decode
from megatron_ds.checkpoint.state_keys import EMA, MASTER, STEPS, parse_key
from megatron_ds.errors import CheckpointError, ConversionError
from megatron_ds.hf.family import Part
from megatron_ds.hf.tensor_files import StoredTensor, read_table
from megatron_ds.layers.tensor_slices import TensorSlice, full_slice
from megatron_ds.parallel.consensus import gather_objects

# ---- find the newest intact one --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from.

    Attributes:
        path: the checkpoint; None if none is intact.
        damaged: a line for each newer one, naming the damaged file.
    """

    path: Path | None = None
    damaged: tuple[str, ...] = ()


def newest_intact(folder: Path, rank: int = 0, world_size: int = 1) -> ResumePoint:
    """Return the newest checkpoint in a folder none of whose files is missing or damaged. Collective over the world.

    Every file is read; the ranks divide them among themselves.

    Args:
        folder: a folder on a disk that all ranks see.
        rank, world_size: this rank and the size of the process group.
    """
    names = [path.name for path in checkpoints_in(folder)]
    listed = gather_objects(names) if world_size > 1 else [names]
    damaged: list[str] = []
    if listed[0] and not all(listed):
        blind = listed.index([])
        return ResumePoint(
            None, (f"{folder} is not on a disk that all machines share: rank {blind} finds no checkpoints",)
        )
    for name in listed[0]:
        problem = first_damage(folder / name, rank, world_size)
        if problem is None:
            return ResumePoint(folder / name, tuple(damaged))
        damaged.append(problem)
    return ResumePoint(None, tuple(damaged))


def first_damage(directory: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Return the damage of a checkpoint in one line with the file; None if it is intact. Collective over the world."""
    own_damage: str | None = None
    try:
        records = read_manifest(directory)
        own_damage = _check(directory, records, sorted(records)[rank::world_size])
    except CheckpointError as problem:
        own_damage = str(problem)
    everyone = gather_objects(own_damage) if world_size > 1 else [own_damage]
    return next((problem for problem in everyone if problem is not None), None)


def _check(directory: Path, records: Mapping[str, FileRecord], names: Sequence[str]) -> str | None:
    for name in names:
        problem = damage(directory / name, records[name])
        if problem is not None:
            return f"{directory / name} {problem}"
    return None


# ---- read its state --------------------------------------------------------------------------------------------------


class StateReader:
    """The training state of a checkpoint, read tensor by tensor; opening it reads headers only.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: the directory is no checkpoint, or one of its files is not safetensors.
    """

    def __init__(self, directory: Path) -> None:
        if not is_checkpoint(directory):
            raise CheckpointError(f"{directory} is no checkpoint: it has no {STATE}/manifest.json")
        self.directory = directory
        self.progress, self.origin = decode(directory / PROGRESS)
        self._slices: dict[tuple[str, str], list[tuple[TensorSlice, Path, StoredTensor]]] = defaultdict(list)
        try:
            names = [name for name in read_manifest(directory) if name.startswith(f"{STATE}/state-")]
            for file in (directory / name for name in sorted(names)):
                for key, stored in read_table(file).items():
                    kind, name, part = parse_key(key, stored.shape)
                    self._slices[kind, name].append((part, file, stored))
        except (ConversionError, ValueError) as problem:
            raise CheckpointError(f"{directory}: {problem}") from problem

    @property
    def optimizer_kinds(self) -> frozenset[str]:
        """The kinds of state that its optimizer kept; see `GuardedOptimizer.state_kinds`."""
        return frozenset(kind for kind, _ in self._slices if kind not in (MASTER, EMA))

    @property
    def has_average(self) -> bool:
        """True if it has an average of the weights."""
        return any(kind == EMA for kind, _ in self._slices)

    def has(self, kind: str, name: str) -> bool:
        """Return whether there is state of a kind for a parameter."""
        return (kind, name) in self._slices

    def read(self, kind: str, name: str, wanted: TensorSlice, place: Tensor) -> None:
        """Copy the elements of a slice into a tensor of its shape.

        Raises:
            CheckpointError: some of them are missing.
        """
        missing = wanted.numel
        for part, file, stored in self._slices[kind, name]:
            common = part.intersect(wanted)
            if common is not None:
                place[common.index_in(wanted)].copy_(stored.view(file)[common.index_in(part)])
                missing -= common.numel
        if missing:
            raise CheckpointError(f"{self.directory}: {missing} elements of {kind} of {name} are not in its state")

    def read_full(self, kind: str, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read the state of a full parameter, (shape) fp32."""
        place = torch.empty(shape, dtype=torch.float32)
        self.read(kind, name, full_slice(shape), place)
        return place

    def read_part(self, kind: str, part: Part, shape: tuple[int, ...]) -> Tensor:
        """Read the state of a full parameter, or of one expert of it, (shape) fp32."""
        if part.expert is None:
            return self.read_full(kind, part.name, shape)
        wanted = TensorSlice((part.expert, *(0 for _ in shape)), (1, *shape))
        place = torch.empty(wanted.shape, dtype=torch.float32)
        self.read(kind, part.name, wanted, place)
        return place[0]

    def elements(self, kind: str, name: str) -> int:
        """Return the number of elements of a kind that there are for a parameter."""
        return sum(part.numel for part, _, _ in self._slices[kind, name])

    def elements_by_kind(self) -> dict[str, int]:
        """Return the number of elements of each kind, the masters first."""
        found = dict.fromkeys((MASTER, *sorted({kind for kind, _ in self._slices} - {MASTER, STEPS})), 0)
        for (kind, _), stored in self._slices.items():
            if kind in found:
                found[kind] += sum(part.numel for part, _, _ in stored)
        return found

    def steps(self, name: str) -> float:
        """Return the number of times a parameter was updated."""
        ((_, file, stored),) = self._slices[STEPS, name]
        return float(stored.view(file))
