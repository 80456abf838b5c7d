"""Read checkpoints from their files: which one is newest and whole, and what is in its training state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.checkpoint.directory import PROGRESS, STATE, checkpoints_in, is_checkpoint, read_manifest
from megatron_ds.checkpoint.files import FileRecord, damage
from megatron_ds.checkpoint.progress import decode
from megatron_ds.checkpoint.state_keys import KINDS, STEPS, parse_key
from megatron_ds.checkpoint.tensor_slices import Box, whole
from megatron_ds.errors import CheckpointError, ConversionError
from megatron_ds.hf.tensor_files import Stored, read_table

# ---- which one -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResumePoint:
    """What there is to go on from.

    Attributes:
        path: the checkpoint; None if there is none that is whole.
        damaged: a line for each newer one, naming the file.
    """

    path: Path | None = None
    damaged: tuple[str, ...] = ()


def newest_intact(folder: Path, rank: int = 0, world_size: int = 1) -> ResumePoint:
    """The newest checkpoint in a folder none of whose files is missing or damaged. Collective.

    Every file is read; the ranks share them.

    Args:
        folder: on a disk that all ranks see.
        rank, world_size: of the process group.
    """
    mine = [path.name for path in checkpoints_in(folder)]
    listed: list[list[str]] = [mine]
    if world_size > 1:
        listed = [[]] * world_size
        dist.all_gather_object(listed, mine)
    damaged: list[str] = []
    if listed[0] and not all(listed):
        blind = listed.index([])
        return ResumePoint(None, (f"{folder} is not on a disk that all machines share: rank {blind} sees nothing",))
    for name in listed[0]:
        problem = first_damage(folder / name, rank, world_size)
        if problem is None:
            return ResumePoint(folder / name, tuple(damaged))
        damaged.append(problem)
    return ResumePoint(None, tuple(damaged))


def first_damage(directory: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with a checkpoint, in one line naming the file; None if it is as it was written. Collective."""
    mine: str | None = None
    try:
        records = read_manifest(directory)
        mine = _check(directory, records, sorted(records)[rank::world_size])
    except CheckpointError as problem:
        mine = str(problem)
    everyone: list[str | None] = [mine]
    if world_size > 1:
        everyone = [None] * world_size
        dist.all_gather_object(everyone, mine)
    return next((problem for problem in everyone if problem is not None), None)


def _check(directory: Path, records: Mapping[str, FileRecord], names: Sequence[str]) -> str | None:
    for name in names:
        problem = damage(directory / name, records[name])
        if problem is not None:
            return f"{directory / name} {problem}"
    return None


# ---- what is in it ---------------------------------------------------------------------------------------------------


class StateReader:
    """The training state of a checkpoint, tensor by tensor; opening it reads headers only.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: it is none, or a file of it is no safetensors.
    """

    def __init__(self, directory: Path) -> None:
        if not is_checkpoint(directory):
            raise CheckpointError(f"{directory} is no checkpoint: it has no {STATE}/manifest.json")
        self.directory = directory
        self.progress, self.origin = decode(directory / PROGRESS)
        self._boxes: dict[tuple[str, str], list[tuple[Box, Path, Stored]]] = defaultdict(list)
        try:
            names = [name for name in read_manifest(directory) if name.startswith(f"{STATE}/state-")]
            for file in (directory / name for name in sorted(names)):
                for key, stored in read_table(file).items():
                    kind, name, box = parse_key(key, stored.shape)
                    self._boxes[kind, name].append((box, file, stored))
        except (ConversionError, ValueError) as problem:
            raise CheckpointError(f"{directory}: {problem}") from problem

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self._boxes

    def read(self, kind: str, name: str, wanted: Box, place: Tensor) -> None:
        """Copy the elements of a box into a tensor of its shape.

        Raises:
            CheckpointError: some of them are not there.
        """
        missing = wanted.numel
        for box, file, stored in self._boxes[kind, name]:
            common = box.meet(wanted)
            if common is not None:
                place[common.inside(wanted)].copy_(stored.view(file)[common.inside(box)])
                missing -= common.numel
        if missing:
            raise CheckpointError(f"{self.directory}: {missing} elements of {kind} of {name} are not in its state")

    def read_whole(self, kind: str, name: str, shape: tuple[int, ...]) -> Tensor:
        """All of a parameter, (shape) fp32."""
        place = torch.empty(shape, dtype=torch.float32)
        self.read(kind, name, whole(shape), place)
        return place

    def elements_by_kind(self) -> dict[str, int]:
        """How many elements there are of each kind."""
        found = dict.fromkeys(KINDS, 0)
        for (kind, _), parts in self._boxes.items():
            if kind in found:
                found[kind] += sum(box.numel for box, _, _ in parts)
        return found

    def steps(self, name: str) -> float:
        """How often a parameter was updated."""
        ((_, file, stored),) = self._boxes[STEPS, name]
        return float(stored.view(file))
