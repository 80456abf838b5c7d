"""Copy checkpoints from the machines' own disks to the shared one while training continues.

Each rank has a thread, which lets a process of its own copy the files that the rank has written. The threads agree over
a process group of their own on the checkpoint that comes next: the newest that all ranks have. Rank 0's thread gives it
its name when all have copied.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ds.checkpoint import directory as naming
from megatron_ds.checkpoint.copy_worker import FileCopy
from megatron_ds.checkpoint.directory import STATE, checkpoints_in, is_checkpoint, name_of, step_of
from megatron_ds.checkpoint.files import FileRecord
from megatron_ds.checkpoint.local_disks import LocalDisk
from megatron_ds.checkpoint.passed_through import PASSED_THROUGH
from megatron_ds.errors import CheckpointError
from megatron_ds.log import get_logger
from megatron_ds.parallel.consensus import gather_objects
from megatron_ds.worker_process import WorkerProcess


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint that is complete on the machines' own disks.

    Attributes:
        step: of the run.
        began_s: the time of its snapshot, by the monotonic clock.
        names: the files that this rank has written.
        records: of the files of all ranks.
    """

    step: int
    began_s: float
    names: Sequence[str]
    records: Mapping[str, FileRecord]


@dataclass(frozen=True)
class Drained:
    """A checkpoint that is no longer waiting to be copied.

    Attributes:
        step: of the run.
        written_s: seconds from the snapshot until it had its name there.
        problem: why it is not on the shared disk; None = it is.
    """

    step: int
    written_s: float
    problem: str | None = None


class Drain:
    """The copies of one rank. Its construction is collective over the world; so is each copy, in its thread.

    Args:
        disk: the machine's own disk.
        folder: the run's `checkpoints`, on the shared one.
        rank: this rank.
        keep: the number of checkpoints that are kept there.
        protected: checkpoints there that are never removed.
        timeout: the time that ranks wait for the one with the slowest storage.

    Attributes:
        machines: the machine of each rank.
        first_here: the lowest rank that has this machine's disk.
    """

    def __init__(
        self, disk: LocalDisk, folder: Path, rank: int, keep: int, protected: Sequence[Path], timeout: timedelta
    ) -> None:
        self._disk, self._folder, self._rank, self._keep, self._protected = disk, folder, rank, keep, protected
        self._group = None if dist.get_world_size() == 1 else dist.new_group(backend="gloo", timeout=timeout)
        self.machines: list[str] = self._gather(disk.machine)
        self.first_here = self.machines.index(self.machines[rank])
        self._changed = threading.Condition()
        self._waiting: list[LocalCheckpoint] = []
        self._drained: list[Drained] = []
        self._last: Drained | None = None
        self._defect: BaseException | None = None
        self._is_copying = False
        self._process: _CopyProcess | None = None
        self._thread: threading.Thread | None = None

    def begin(self, checkpoint: LocalCheckpoint) -> None:
        """Copy a checkpoint next, instead of those that wait. Called on every rank in the same order."""
        with self._changed:
            self._waiting.append(checkpoint)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoint-drain", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def has_ended_one(self) -> bool:
        """True if `take` returns something. Not collective."""
        return bool(self._drained) or self._defect is not None

    @property
    def copied_bytes(self) -> int:
        """Number of bytes that this rank has copied so far."""
        return self._process.copied_bytes if self._process is not None else 0

    def take(self) -> Drained | None:
        """Return the first that has ended since the last call."""
        if self._defect is not None:
            raise self._defect
        with self._changed:
            return self._drained.pop(0) if self._drained else None

    def wait(self, every_s: float, tell: Callable[[int], None]) -> None:
        """Wait until nothing is left to be copied; meanwhile `tell` is called with the bytes copied so far."""
        with self._changed:
            while (self._waiting or self._is_copying) and self._defect is None:
                self._changed.wait(every_s)
                tell(self.copied_bytes)
        if self._defect is not None:
            raise self._defect

    def check_last(self) -> None:
        """Check that the last checkpoint was copied.

        Raises:
            CheckpointError: it was not.
        """
        if self._last is not None and self._last.problem is not None:
            raise CheckpointError(
                f"{self._folder}: {name_of(self._last.step)} could not be copied from {self._disk.folder}: "
                f"{self._last.problem}; it is complete there: fix this and start again, and the run copies it"
            )

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting)
                    self._is_copying = True
                    newest = self._waiting[-1].step
                self._copy_next(min(self._gather(newest)))
        except BaseException as problem:  # the end of another rank, or a defect: `take` raises it
            self._defect = problem
            with self._changed:
                self._changed.notify_all()

    def _copy_next(self, step: int) -> None:
        """Copy the checkpoint of a step, which every rank has; earlier ones are not copied any more."""
        with self._changed:
            passed = [one for one in self._waiting if one.step < step]
            (checkpoint,) = (one for one in self._waiting if one.step == step)
            self._waiting = [one for one in self._waiting if one.step > step]
        ended = [Drained(one.step, 0.0, f"{name_of(step)} is complete already") for one in passed]
        problem = self._copy(checkpoint)
        self._last = Drained(step, time.monotonic() - checkpoint.began_s, problem)
        with self._changed:
            self._drained += [*ended, self._last]
            self._is_copying = False
            self._changed.notify_all()

    def _copy(self, checkpoint: LocalCheckpoint) -> str | None:
        """Copy a checkpoint on all ranks; return the problem of the lowest rank that has one."""
        self._remove_old(checkpoint)  # now, not when this one is copied: a slow shared disk would fill the machine's
        target = naming.temporary_for(self._folder, checkpoint.step)
        problems: list[str] = []
        for act in (self._make, self._copy_files, self._finish):
            problem: str | None = None
            try:
                act(checkpoint, target)
            except OSError as error:
                problem = f"rank {self._rank}: {error.strerror or error}"
            problems = [one for one in self._gather(problem) if one is not None]
            if problems:
                if self._rank == 0:
                    shutil.rmtree(target, ignore_errors=True)
                break
        return problems[0] if problems else None

    def _make(self, checkpoint: LocalCheckpoint, target: Path) -> None:
        if self._rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            (target / STATE).mkdir(parents=True)

    def _copy_files(self, checkpoint: LocalCheckpoint, target: Path) -> None:
        if self._process is None or self._process.is_dead:
            self._process = _CopyProcess()
        source = self._disk.folder / name_of(checkpoint.step)
        self._process.copy(
            FileCopy(
                str(source / name),
                str(target / name),
                checkpoint.records[name].bytes,
                checkpoint.records[name].xxh3_128,
                self._former(name, checkpoint.records[name]) if name == PASSED_THROUGH else "",
            )
            for name in checkpoint.names
        )

    def _former(self, name: str, record: FileRecord) -> str:
        """Return the same file in the newest checkpoint on the shared disk; empty if it has another, or none."""
        for path in checkpoints_in(self._folder)[:1]:
            with contextlib.suppress(CheckpointError):
                if naming.read_manifest(path).get(name) == record:
                    return str(path / name)
        return ""

    def _finish(self, checkpoint: LocalCheckpoint, target: Path) -> None:
        if self._rank != 0:
            return
        naming.write_manifest(target, dict(checkpoint.records))
        final = naming.put_in_place(self._folder, checkpoint.step)
        try:
            naming.remove_old(self._folder, self._keep, (*self._protected, final))
        except OSError as problem:  # the new one is complete: an old one that stays is no reason to stop
            get_logger().warning("%s: an old checkpoint could not be removed (%s)", self._folder, problem)

    def _remove_old(self, checkpoint: LocalCheckpoint) -> None:
        """Remove the checkpoints on this machine's disk that are earlier than one that is complete on all of them."""
        if self.first_here != self._rank:
            return
        try:
            complete = [one for one in checkpoints_in(self._disk.folder) if is_checkpoint(one)]
            newer = [one for one in complete if step_of(one) >= checkpoint.step]
            naming.remove_old(self._disk.folder, len(newer), ())
        except OSError as problem:  # it costs room alone
            get_logger().warning("%s: an old checkpoint could not be removed (%s)", self._disk.folder, problem)

    def _gather(self, local: Any) -> list[Any]:
        return gather_objects(local, self._group) if self._group is not None else [local]


class _CopyProcess(WorkerProcess):
    """A process of `copy_worker`.

    Attributes:
        copied_bytes: number of bytes that it has copied so far.
    """

    def __init__(self) -> None:
        super().__init__("megatron_ds.checkpoint.copy_worker")
        self.copied_bytes = 0

    def copy(self, files: Iterable[FileCopy]) -> None:
        """Copy files, one after the other.

        Raises:
            OSError: one of them cannot be copied.
        """
        self.send(list(files))
        while (answer := self.receive()) is not None:
            if "error" in answer:
                raise OSError(answer["error"])
            if "done" in answer:
                return
            self.copied_bytes += answer["bytes"]
        raise OSError(f"the process that copies ended with status {self.wait()}")
