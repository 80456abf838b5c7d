"""The tensors of a checkpoint that are not trained and pass through, such as those of a vision tower.

They are in a file of their own, which is the same in every checkpoint of a run. So each save links the file of the one
before, which costs neither time nor space; where the file system has no hard links it is copied. Every checkpoint that
has it reads it once and records its checksum. It is written once, and never changed: a link is as safe as a copy.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_ds.checkpoint.directory import is_checkpoint, read_manifest
from megatron_ds.checkpoint.files import FileRecord, TensorChunk, TensorHeader, flush, record_file, write_chunks
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.weights import HFWeights

PASSED_THROUGH = "passed_through.safetensors"
_WAYS: tuple[Callable[[Path, Path], object], ...] = (os.link, shutil.copyfile)


@dataclass(frozen=True)
class _Former:
    """The file in an earlier checkpoint, with the length and checksum that it must have."""

    file: Path
    record: FileRecord


class PassedThrough:
    """The file of one run's checkpoints.

    Args:
        weights: reader of the directory that has the tensors.
    """

    def __init__(self, weights: HFWeights) -> None:
        self._weights = weights
        self._former = _find(weights.directory.resolve())

    @cached_property
    def headers(self) -> list[TensorHeader]:
        """Names, dtypes and shapes of the tensors, in the order of the file."""
        names, source = self._weights.model.passed_through, self._weights.source
        tensors = ((name, source.tensor(name)) for name in names)  # mapped, not read
        return [TensorHeader(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]

    def put(self, directory: Path) -> FileRecord:
        """Link, copy or write the file into the directory of a new checkpoint, and flush it to the disk.

        Raises:
            OSError: the disk is full, or the source has other tensors than when the run began.
        """
        former, place = self._former, directory / PASSED_THROUGH
        if former is not None and any(_made(way, former, place) for way in _WAYS):
            return former.record
        chunks = (TensorChunk(PASSED_THROUGH, name, tensor) for name, tensor in self._weights.passed_through())
        record = write_chunks(directory, {PASSED_THROUGH: self.headers}, chunks)[PASSED_THROUGH]
        if former is not None and record != former.record:
            raise OSError(f"the tensors that pass through have changed in {self._weights.directory}")
        return record

    def now_in(self, checkpoint: Path, record: FileRecord) -> None:
        """Let the next save use the file of a complete checkpoint."""
        self._former = _Former(checkpoint / PASSED_THROUGH, record)


def _find(directory: Path) -> _Former | None:
    """Return the file of the checkpoint that the weights are read from, if it has one."""
    if not (is_checkpoint(directory) and (directory / PASSED_THROUGH).is_file()):
        return None
    try:
        return _Former(directory / PASSED_THROUGH, read_manifest(directory)[PASSED_THROUGH])
    except (CheckpointError, KeyError):  # a checkpoint that was changed by hand: the tensors are written anew
        return None


def _made(way: Callable[[Path, Path], object], former: _Former, place: Path) -> bool:
    """Link or copy a former file and return True if it is intact then; otherwise nothing is there."""
    try:
        way(former.file, place)
        if record_file(place) == former.record:
            flush(place)
            return True
    except OSError:  # no hard links here, or the former one is gone: the next way is tried, and the last one says why
        pass
    place.unlink(missing_ok=True)
    return False
