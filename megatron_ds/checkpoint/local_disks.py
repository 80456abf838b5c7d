"""Checkpoints on the machines' own disks: `checkpoint.local`.

```
DIR/3f9c2a17d04be851/          a directory of the run, named by the token in its output
  step_00000200/               the files that this machine's ranks have written, and its neighbour's
    training_state/manifest.json    lists the files of all machines
```

A checkpoint here has its name once all ranks have written their files. Afterwards it is copied to the run's
`checkpoints` (`drain`), or at the next start, if the run ended before that. Each start draws another token, after that:
the directory takes the new name on the machines that take part. A machine that was absent while the run continued from
an earlier step has the old name, and its checkpoints are never read; neither are those of another run that had the same
output.
"""

from __future__ import annotations

import errno
import re
import secrets
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron_ds.atomic import replacing
from megatron_ds.checkpoint import directory as naming
from megatron_ds.checkpoint.copy_worker import FileCopy, copy_file
from megatron_ds.checkpoint.directory import STATE, checkpoints_in, is_checkpoint, name_of, step_of
from megatron_ds.checkpoint.files import FileRecord, write_bytes
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.consensus import gather_objects, run_long_on_all_ranks, run_on_all_ranks
from megatron_ds.processes import boot_id
from megatron_ds.untrusted import read_text
from megatron_ds.untrusted.limits import SHORT_TEXT

TOKEN = ".local"
"""The file in a run's `checkpoints` with the name of its directory on the machines' disks."""
_TOKEN = re.compile(r"[0-9a-f]{16}")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@dataclass(frozen=True)
class LocalDisk:
    """The directory of a run on this machine's disk.

    Attributes:
        folder: the directory.
        copies: the number of machines that keep each file.
    """

    folder: Path
    copies: int = 1

    @property
    def machine(self) -> str:
        """A text that is the same on all ranks that have this directory in common.

        Containers of one machine may have names of their own, and machines made from one image the same name, so that
        the kernel's start is used instead where it has a number.
        """
        found = self.folder.stat()
        return f"{boot_id() or socket.gethostname()} {found.st_dev} {found.st_ino}"

    def renamed(self, token: str) -> LocalDisk:
        """Return it with its directory under the name of another token. The directory itself is not renamed."""
        return replace(self, folder=self.folder.with_name(token))


def read_token(folder: Path) -> str | None:
    """Return the token in a run's `checkpoints`; None = it has no valid one."""
    try:
        text = read_text(folder / TOKEN, SHORT_TEXT, CheckpointError).strip()
    except CheckpointError:
        return None
    return text if _TOKEN.fullmatch(text) else None


def draw_token(folder: Path) -> str:
    """Draw the token of a start of a run, and write it into the run's `checkpoints`. Rank 0 only.

    Raises:
        OSError: it cannot be written.
    """
    token = secrets.token_hex(8)
    with replacing(folder / TOKEN) as temporary:
        write_bytes(temporary, f"{token}\n".encode())
    return token


def make_local_disk(place: str, token: str, copies: int) -> LocalDisk:
    """Make the run's directory on this machine.

    Raises:
        CheckpointError: it cannot be written.
    """
    folder = Path(place) / token
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise CheckpointError(
            f"checkpoint.local={place} cannot be written on {socket.gethostname()} ({problem.strerror or problem}); "
            "try a directory on a disk of every machine"
        ) from problem
    return LocalDisk(folder, copies)


@dataclass(frozen=True)
class _Found:
    """A checkpoint on the disk of one rank's machine: the records of all files, and the names of those here."""

    records: Mapping[str, FileRecord]
    names: tuple[str, ...]


def bring_back(place: str, shared: Path, newest: int, rank: int) -> tuple[Path | None, tuple[str, ...]]:
    """Copy the newest checkpoint that is only on the machines' own disks to the shared one. Collective over the world.

    Every file is taken from a rank whose machine has it, so it does not matter on how many ranks and machines the run
    continues, as long as each file is intact on one of them. The ranks of a machine divide its files among themselves.

    Args:
        place: `checkpoint.local`.
        shared: the run's `checkpoints`.
        newest: the step of the newest intact checkpoint there; -1 = no checkpoint is intact.
        rank: this rank.

    Returns:
        the checkpoint that was copied, None = no newer one was found, and lines for the log.

    Raises:
        CheckpointError: the machine's disk cannot be read, or the shared one has no room: to resume from an earlier
            step would lose a complete checkpoint.
    """
    token = gather_objects(read_token(shared) if rank == 0 else None)[0]
    everyone = gather_objects(run_on_all_ranks(lambda: _found_in(Path(place), token, newest)))
    notes: list[str] = []
    for step in sorted({step for one in everyone for step in one}, reverse=True):
        found = [one.get(step) for one in everyone]
        records = next(one.records for one in found if one is not None)
        move = _Move(Path(place) / str(token) / name_of(step), shared, step, records)
        names = [set(one.names) if one is not None else set() for one in found]
        final = _copy_from_all(move, names, newest, rank, notes)
        if final is not None:
            return final, (*notes, f"{name_of(step)} was copied from the disks at checkpoint.local={place}")
    return None, tuple(notes)


def _copy_from_all(move: _Move, names: Sequence[set[str]], newest: int, rank: int, notes: list[str]) -> Path | None:
    """Copy a checkpoint to the shared disk; None = one of its files is on no disk. Collective over the world.

    Args:
        move: the checkpoint.
        names: of each rank, the files on its machine; a file that cannot be copied is taken out, and another has it.
        newest: see `bring_back`.
        rank: this rank.
        notes: lines for the log.
    """
    while True:
        holders = {name: _holder(number, name, names) for number, name in enumerate(move.records)}
        missing = [name for name, holder in holders.items() if holder is None]
        if missing:
            more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
            notes.append(f"{move.source} is not complete: no machine has {missing[0]}{more}")
            if rank == 0:
                shutil.rmtree(naming.temporary_for(move.shared, move.step), ignore_errors=True)
            return None
        own = [name for name, holder in holders.items() if holder == rank]
        failed = gather_objects(run_long_on_all_ranks(partial(move.copy, own)))
        if not any(failed):
            finish = partial(move.finish, newest) if rank == 0 else lambda: None
            return gather_objects(run_on_all_ranks(finish))[0]
        for one, problems in enumerate(failed):
            notes += [f"rank {one} cannot copy {move.source / name} ({text})" for name, text in problems.items()][:1]
            names[one].difference_update(problems)


def _found_in(place: Path, token: str | None, newest: int) -> dict[int, _Found]:
    found: dict[int, _Found] = {}
    try:
        for path in checkpoints_in(place / token) if token is not None else ():
            if step_of(path) > newest and is_checkpoint(path):
                try:
                    records = naming.read_manifest(path)
                except CheckpointError:
                    continue
                sizes = {name: (path / name).stat().st_size for name in records if (path / name).is_file()}
                here = tuple(name for name, size in sizes.items() if size == records[name].bytes)
                found[step_of(path)] = _Found(records, here)
    except OSError as problem:
        raise CheckpointError(
            f"checkpoint.local={place} cannot be read on {socket.gethostname()} ({problem.strerror or problem}); "
            "try again when it can, or take that machine out of the run"
        ) from problem
    return found


def _holder(number: int, name: str, names: Sequence[set[str]]) -> int | None:
    """Return the rank that copies the file with this number; None = no machine has it."""
    ranks = [rank for rank, its in enumerate(names) if name in its]
    return ranks[number % len(ranks)] if ranks else None


@dataclass(frozen=True)
class _Move:
    """A checkpoint on this machine's disk that is copied to the shared one.

    Attributes:
        source: its directory here.
        shared: the run's `checkpoints`.
        step: of the run.
        records: of the files of all machines.
        copied: the files that this rank has copied so far.
    """

    source: Path
    shared: Path
    step: int
    records: Mapping[str, FileRecord]
    copied: set[str] = field(default_factory=set)

    def copy(self, names: Sequence[str]) -> dict[str, str]:
        """Copy those of some files that are not copied yet; return the problem of each that cannot be.

        Raises:
            CheckpointError: the shared disk has no room.
        """
        target, failed = naming.temporary_for(self.shared, self.step), dict[str, str]()
        for name in (one for one in names if one not in self.copied):
            record = self.records[name]
            try:
                copy_file(FileCopy(str(self.source / name), str(target / name), record.bytes, record.xxh3_128))
                self.copied.add(name)
            except OSError as problem:
                if problem.errno in _NO_ROOM:
                    shutil.rmtree(target, ignore_errors=True)
                    raise self._refusal(problem) from problem
                failed[name] = problem.strerror or str(problem)
        return failed

    def finish(self, newest: int) -> Path:
        """Give the copy its name. Damaged ones of later steps than the newest intact one are moved aside.

        Raises:
            CheckpointError: the shared disk cannot be written.
        """
        target = naming.temporary_for(self.shared, self.step)
        try:
            naming.set_aside(self.shared, newest)
            (target / STATE).mkdir(parents=True, exist_ok=True)
            naming.write_manifest(target, dict(self.records))
            return naming.put_in_place(self.shared, self.step)
        except OSError as problem:
            raise self._refusal(problem) from problem

    def _refusal(self, problem: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.shared}: {name_of(self.step)} is complete in {self.source.parent}, and could not be copied "
            f"({problem.strerror or problem}); fix this and start again, and the run copies it"
        )
