"""Save a live run: take a snapshot, write it on every rank, and rename it when every file is written.

With `asynchronous` only the snapshot stops the training. A thread of each rank writes the files; the threads agree over
a process group of their own that all have written, and rank 0's thread then gives the checkpoint its name.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megatron_ds.checkpoint import directory as naming
from megatron_ds.checkpoint.directory import PROGRESS, STATE
from megatron_ds.checkpoint.drain import Drain, LocalCheckpoint
from megatron_ds.checkpoint.files import FileRecord, TensorChunk, write_bytes, write_chunks
from megatron_ds.checkpoint.local_disks import LocalDisk
from megatron_ds.checkpoint.neighbour_copies import exchange_files
from megatron_ds.checkpoint.passed_through import PASSED_THROUGH
from megatron_ds.checkpoint.progress import Origin, Progress, encode, timestamp
from megatron_ds.checkpoint.snapshot import RankFiles, plan_snapshot, take_snapshot
from megatron_ds.checkpoint.snapshot_memory import HostMemory, copies_for
from megatron_ds.checkpoint.state import differing_master, loss_scale
from megatron_ds.checkpoint.weights import AdapterWriter, ModelWriter
from megatron_ds.checkpoint.wide_weights import WeightSource
from megatron_ds.engine import Engine
from megatron_ds.engine.optimizer_shards import optimizer_shards
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.config import HFModel
from megatron_ds.hf.end_tokens import files_with_end_ids
from megatron_ds.hf.peft.adapters import Adapters
from megatron_ds.log import get_logger
from megatron_ds.parallel.consensus import gather_objects
from megatron_ds.parallel.shared_directory import wait_for_text

TOKEN = ".token"  # in a directory that is being written
TELL_S = 5.0  # interval between two texts of `finish`
SLOWEST_S = 7200.0  # the time that ranks wait for the one with the slowest storage


@dataclass(frozen=True)
class SaveOptions:
    """Settings of a run's checkpoints.

    Attributes:
        folder: the folder of the checkpoints.
        keep: the number of checkpoints that are kept.
        asynchronous: whether training continues while files are written.
        protected: checkpoints that are never removed.
        model_path, tokenizer_path: the sources of generation settings and tokenizer files, read once.
        end_ids: the ids that the data teach as an end, which the generation settings list too.
        source: the weights that the run began with.
        disk: the machine's own disk, where checkpoints are written first; None = they are not.
    """

    folder: Path
    keep: int = 3
    asynchronous: bool = True
    protected: tuple[Path, ...] = ()
    model_path: str | None = None
    tokenizer_path: str | None = None
    end_ids: tuple[int, ...] = ()
    source: WeightSource = field(default_factory=WeightSource)
    disk: LocalDisk | None = None


@dataclass(frozen=True)
class Saved:
    """A saved checkpoint and its cost.

    Attributes:
        path: its directory.
        step: the run's step.
        bytes: of all files, over all ranks.
        waited_s: seconds that training waited until the previous one was written.
        paused_s: seconds that training was stopped in total, that wait included.
        written_s: seconds from the snapshot until it had its name.
        host_bytes: memory of this rank that asynchronous saving holds.
        local_s: seconds from the snapshot until it was complete on the machines' own disks; None = without them.
    """

    path: str
    step: int
    bytes: int
    waited_s: float
    paused_s: float
    written_s: float
    host_bytes: int
    local_s: float | None = None


class Saver:
    """Saves the checkpoints of one run.

    Its construction, `save` and `wait` are collective over the world: every rank calls them after the same step.

    Args:
        engine: the engine whose state is saved.
        model: its Hugging Face names and config.
        options: where and how checkpoints are saved.
        origin: the run that writes them.
        adapters: the adapters that are trained, if there are any; then they alone are saved.

    Raises:
        ConversionError: on rank 0, if the tokenizer's files are damaged.
    """

    def __init__(
        self,
        engine: Engine,
        model: HFModel,
        options: SaveOptions,
        origin: Origin,
        adapters: Adapters | None = None,
    ) -> None:
        self.engine, self.options, self.origin = engine, options, origin
        inventory = engine.inventory()
        self.weights: ModelWriter | AdapterWriter
        if adapters is None:
            paths = options.model_path, options.tokenizer_path
            self.weights = ModelWriter(engine, model, inventory, options.source, *paths)
        else:
            self.weights = AdapterWriter(engine, adapters, inventory, options.tokenizer_path)
        # the threads' communication must not mix with that of training, and needs no accelerator
        alone = dist.get_world_size() == 1
        self.group = None if alone else dist.new_group(backend="gloo", timeout=timedelta(seconds=SLOWEST_S))
        self.trained = self._all_trained([name for stage in inventory for name, _, _ in stage])
        small = self.weights.small_files() if engine.grid.rank == 0 else {}
        self.small = files_with_end_ids(small, options.end_ids)
        self.memory = self._reserve_memory() if options.asynchronous else None
        self._writing: _Writing | None = None
        self._on_disk: dict[int, _Writing] = {}
        self._drain: Drain | None = None
        if options.disk is not None:
            rank, slowest = engine.grid.rank, timedelta(seconds=SLOWEST_S)
            self._drain = Drain(options.disk, options.folder, rank, options.keep, options.protected, slowest)

    def save(self, progress: Progress) -> Saved | None:
        """Save the run as it is now; returns when training may continue. Collective over the world.

        On a GPU the copies may still run then, until the next step of the optimizer, which waits for them. Before it
        nothing else may write to parameters or optimizer state.

        Returns:
            The previous save, if it was still being written: it is waited for. None with a disk of the machine's own.

        Raises:
            CheckpointError: on every rank, if any could not write, or holds masters that do not round to its weights;
                earlier checkpoints are unchanged.
        """
        began_s = time.monotonic()
        before = self._end_writing()
        if self._drain is not None:
            before = None  # it is returned when it is copied, by `wait`, on all ranks at once
        waited_s = time.monotonic() - began_s
        self._check_masters(progress.step)
        end_ids = self.options.end_ids
        progress = replace(progress, loss_scale=loss_scale(self.engine), trained=self.trained, end_ids=end_ids)
        writing = _Writing(self, progress, began_s, waited_s)
        writing.make_directory()
        files = take_snapshot(self.engine, self.weights, self.memory)
        if self.memory is not None:
            copies = list(files.chunks)
            self.memory.finish()
            files = replace(files, chunks=_when_complete(self.memory, copies))
        writing.start(files, in_thread=self.memory is not None)
        self._writing = writing
        return before

    @property
    def is_due(self) -> bool:
        """True if a save has ended on this rank, so that `wait` returns at once. Not collective."""
        has_ended = self._writing is not None and not self._writing.is_running
        if self._drain is None or self._writing is None:
            return has_ended or (self._drain is not None and self._drain.has_ended_one)
        return (has_ended and self._writing.has_failed) or self._drain.has_ended_one

    def wait(self) -> Saved | None:
        """Wait until the last save is complete and return it; None if nothing is being written.

        With a disk of the machine's own it does not wait, and returns the next checkpoint that was copied from there.
        Collective over the world.

        Raises:
            CheckpointError: on every rank, if any could not write it.
        """
        if self._drain is not None:
            if self._writing is not None and not self._writing.is_running:
                self._end_writing()
            return self._take_copied(self._drain)
        return self._end_writing()

    def finish(self, tell: Callable[[str], None]) -> Iterator[Saved]:
        """Wait for all saves and yield those that were not returned before. Collective over the world.

        Args:
            tell: called with a text while checkpoints are copied from the machine's own disk.

        Raises:
            CheckpointError: on every rank, if any could not write the last one.
        """
        saved = self._end_writing()
        if self._drain is None:
            if saved is not None:
                yield saved
            return
        text = f"copying the last checkpoint to {self.options.folder}"
        self._drain.wait(TELL_S, lambda copied: tell(f"{text}: {copied / 1e6:,.0f} MB"))
        while self._drain.has_ended_one:
            if (saved := self._take_copied(self._drain)) is not None:
                yield saved
        self._drain.check_last()

    def _end_writing(self) -> Saved | None:
        """Wait until the files of the last save are written."""
        writing, self._writing = self._writing, None
        return writing.result() if writing is not None else None

    def _begin_copy(self, writing: _Writing) -> None:
        """Let a checkpoint that is complete on the machines' own disks be copied to the shared one."""
        if self._drain is not None:
            self._on_disk[writing.step] = writing
            self._drain.begin(LocalCheckpoint(writing.step, writing.began_s, writing.names, writing.records))

    def _take_copied(self, drain: Drain) -> Saved | None:
        """Return the next checkpoint that was copied from the machine's own disk; None if it could not be."""
        drained = drain.take()
        if drained is None:
            return None
        saved = self._on_disk.pop(drained.step).result()
        name = naming.name_of(drained.step)
        if drained.problem is None:
            return replace(saved, path=str(self.options.folder / name), written_s=drained.written_s)
        if self.engine.grid.rank == 0:
            get_logger().warning("%s is not copied to %s: %s", name, self.options.folder, drained.problem)
        return None

    @property
    def machines(self) -> Sequence[str]:
        """The machine of each rank, by its own disk; empty without such disks."""
        return self._drain.machines if self._drain is not None else ()

    @property
    def distances(self) -> range:
        """The places in the ring of machines to which each one's files are sent."""
        disk, num_machines = self.options.disk, len(set(self.machines))
        return range(1, min(disk.copies, num_machines)) if disk is not None else range(0)

    @property
    def naming_rank(self) -> int:
        """The rank that gives checkpoints their names: 0, or the lowest one that has this machine's own disk."""
        return self._drain.first_here if self._drain is not None else 0

    def gather(self, local: Any) -> list[Any]:
        """Gather an object from every rank on every rank. Collective over the world."""
        return gather_objects(local, self.group) if self.group is not None else [local]

    def _reserve_memory(self) -> HostMemory:
        """Return memory for the snapshots; the optimizer's steps wait for copies that are still running.

        Page-locking takes up to a second a GB, so it is done here, before the first step. Collective over pipeline.
        """
        memory = HostMemory(copies_for(self.engine.device))
        memory.reserve(plan_snapshot(self.engine, self.weights).headers)
        self.engine.optimizer.register_step_pre_hook(lambda *_: memory.hold_back())
        return memory

    def _check_masters(self, step: int) -> None:
        """Refuse to save optimizer state that belongs to other parameters. Collective over the world."""
        for rank, name in enumerate(self.gather(differing_master(self.engine))):
            if name is not None:
                raise CheckpointError(
                    f"{self.options.folder}: {naming.name_of(step)} is not saved: on rank {rank} the fp32 master of "
                    f"{name} does not round to its weight, so it would hold the state of other parameters; try a "
                    "DeepSpeed JSON with no other keys than bf16 and zero_optimization.stage"
                )

    def _all_trained(self, order: list[str]) -> tuple[str, ...]:
        everyone = self.gather([shard.name for shard in optimizer_shards(self.engine)])
        trained = {name for names in everyone for name in names}
        return tuple(name for name in order if name in trained)


def _when_complete(memory: HostMemory, chunks: Sequence[TensorChunk]) -> Iterator[TensorChunk]:
    """Yield chunks in a snapshot's memory when all copies to it have been made."""
    memory.wait()
    yield from chunks


class _Problem(NamedTuple):
    """A failure on one rank: an error of its disk in one line, or a defect in this code with its traceback."""

    text: str
    is_defect: bool


class _Writing:
    """A save in progress on one rank."""

    def __init__(self, saver: Saver, progress: Progress, began_s: float, waited_s: float) -> None:
        self._saver, self._progress = saver, progress
        self._began_s, self._waited_s, self._paused_s, self._written_s = began_s, waited_s, 0.0, 0.0
        disk = saver.options.disk
        self._is_local = disk is not None
        self._folder = disk.folder if disk is not None else saver.options.folder
        self._directory = naming.temporary_for(self._folder, progress.step)
        self._is_first = saver.engine.grid.rank == 0
        self._names_it = saver.engine.grid.rank == saver.naming_rank
        self._thread: threading.Thread | None = None
        self._files: RankFiles | None = None
        self._problems: list[_Problem] = []
        self.step, self.began_s = progress.step, began_s + waited_s
        self.names: Sequence[str] = ()
        self.records: Mapping[str, FileRecord] = {}
        self._defect: BaseException | None = None

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        return bool(self._problems) or self._defect is not None

    def wait(self) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def make_directory(self) -> None:
        """Create an empty directory with a temporary name, seen by all ranks. Collective over the world.

        The rank that names it writes a fresh token there: on a machine whose disk is not shared, a directory of an
        earlier run may have the same name.
        """
        file = self._directory / TOKEN

        def make() -> str:
            token = uuid.uuid4().hex
            if self._names_it:
                shutil.rmtree(self._directory, ignore_errors=True)
                (self._directory / STATE).mkdir(parents=True)
                file.write_text(token, encoding="utf-8")
            return token

        def look() -> None:
            if not wait_for_text(file, token):
                raise FileNotFoundError(f"{self._folder} is not on a disk that all machines share")

        token = self._on_all_ranks(make)[self._saver.naming_rank]
        if not self._problems:
            self._on_all_ranks(look)
        if not self._problems and self._names_it:
            file.unlink(missing_ok=True)
        self._refuse()

    def start(self, files: RankFiles, in_thread: bool) -> None:
        """Write the files, at once or in a thread."""
        self._files = files
        if in_thread:
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run()
        self._paused_s = time.monotonic() - self._began_s

    def result(self) -> Saved:
        """Wait for the end and return the saved checkpoint.

        Raises:
            CheckpointError: see `Saver.wait`.
        """
        self.wait()
        if self._defect is not None:
            raise self._defect
        self._refuse()
        memory = self._saver.memory
        return Saved(
            path=str(self._folder / naming.name_of(self._progress.step)),
            step=self._progress.step,
            bytes=sum(record.bytes for record in self.records.values()),
            waited_s=self._waited_s,
            paused_s=self._paused_s,
            written_s=self._written_s,
            host_bytes=memory.bytes if memory is not None else 0,
            local_s=self._written_s if self._is_local else None,
        )

    def _run(self) -> None:
        files = self._files
        assert files is not None
        try:
            own = self._on_all_ranks(lambda: write_chunks(self._directory, files.files, files.chunks))
            if not self._problems:
                own += self._on_all_ranks(self._write_small)
            for distance in self._saver.distances if not self._problems else ():
                self._on_all_ranks(partial(self._send_on, own, distance))
            if not self._problems:
                self.records = {name: record for by_name in own for name, record in by_name.items()}
                self.names = [*files.files, *(own[-dist.get_world_size()] if self._is_first else ())]
                self._on_all_ranks(self._put_in_place)
            if self._problems and self._names_it:
                shutil.rmtree(self._directory, ignore_errors=True)
            self._written_s = time.monotonic() - self.began_s
            if not self._problems:
                self._saver._begin_copy(self)
        except BaseException as problem:  # in a thread, or the end of another rank: `result` raises it
            self._defect = problem

    def _write_small(self) -> dict[str, FileRecord]:
        """Write the small files, on rank 0 only, and return their records."""
        if not self._is_first:
            return {}
        directory = self._directory
        origin = replace(self._saver.origin, written_at=timestamp())
        small = {**self._saver.small, PROGRESS: encode(self._progress, origin).encode()}
        files: dict[str, FileRecord] = {}
        for name, content in small.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            files[name] = write_bytes(directory / name, content)
        passed_through = self._saver.weights.passed_through
        if passed_through is not None:
            files[PASSED_THROUGH] = passed_through.put(directory)
        return files

    def _send_on(self, own: Sequence[Mapping[str, FileRecord]], distance: int) -> None:
        """Send this rank's files to a later machine, and write those of an earlier one. Collective over the world."""
        num_ranks = dist.get_world_size()
        files = [{**own[rank], **own[num_ranks + rank]} for rank in range(num_ranks)]
        exchange_files(self._directory, files, distance, self._saver.machines, self._saver.group)

    def _put_in_place(self) -> None:
        """Write the manifest, rename the directory, and remove old checkpoints; one rank of each directory."""
        if not self._names_it:
            return
        options = self._saver.options
        naming.write_manifest(self._directory, dict(self.records))
        final = naming.put_in_place(self._folder, self.step)
        passed_through = self._saver.weights.passed_through
        if passed_through is not None and self._is_first:
            passed_through.now_in(final, self.records[PASSED_THROUGH])
        if self._is_local:
            return  # old ones are removed when this one is copied
        try:
            naming.remove_old(self._folder, options.keep, (*options.protected, final))
        except OSError as problem:  # the new one is complete: an old one that stays is no reason to stop
            get_logger().warning("%s: an old checkpoint could not be removed (%s)", self._folder, problem)

    def _on_all_ranks(self, act: Callable[[], Any]) -> list[Any]:
        """Return the results of `act` on every rank; failures are added to `_problems`. Collective over the world."""
        rank, result = self._saver.engine.grid.rank, None
        problem: _Problem | None = None
        try:
            result = act()
        except OSError as error:
            problem = _Problem(f"rank {rank}: {error.strerror or error}", is_defect=False)
        except Exception:  # the others must not wait for this rank
            problem = _Problem(f"rank {rank} failed while saving:\n{traceback.format_exc().rstrip()}", is_defect=True)
        everyone = self._saver.gather((result, problem))
        self._problems += [problem for _, problem in everyone if problem is not None]
        return [result for result, _ in everyone]

    def _refuse(self) -> None:
        if not self._problems:
            return
        for problem in self._problems:
            if problem.is_defect:
                raise RuntimeError(problem.text)
        earlier = naming.checkpoints_in(self._folder)
        left = f"{earlier[0].name} is the newest intact one" if earlier else "there is no earlier one"
        free = shutil.disk_usage(_existing(self._folder)).free
        raise CheckpointError(
            f"{self._folder}: {naming.name_of(self._progress.step)} could not be saved: {self._problems[0].text} "
            f"({free / 1e9:.2f} GB are free there); {left}; fix this and start again: the run resumes from it"
        )


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.resolve().parents) if os.path.exists(place))
