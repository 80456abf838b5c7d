"""Copies between the machines' own disks and the shared one, without a training: what fails, and what comes back."""

import errno
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from megatron_ds.checkpoint import directory as naming
from megatron_ds.checkpoint import drain, local_disks, saver
from megatron_ds.checkpoint.copy_worker import FileCopy, copy_file
from megatron_ds.checkpoint.directory import PROGRESS, STATE, checkpoints_in, name_of
from megatron_ds.checkpoint.drain import Drain, LocalCheckpoint
from megatron_ds.checkpoint.files import record_file, write_bytes
from megatron_ds.checkpoint.local_disks import LocalDisk, bring_back, draw_token
from megatron_ds.checkpoint.progress import Progress
from megatron_ds.checkpoint.reader import ResumePoint, first_damage
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.training.resume import prepare_local_disk


def complete(folder: Path, step: int, more: Mapping[str, bytes] = MappingProxyType({})) -> LocalCheckpoint:
    """Write a checkpoint of small files."""
    directory = folder / name_of(step)
    (directory / STATE).mkdir(parents=True)
    files = {PROGRESS: f"{step}".encode(), **more}
    records = {name: write_bytes(directory / name, content) for name, content in files.items()}
    naming.write_manifest(directory, records)
    return LocalCheckpoint(step, time.monotonic(), list(records), records)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_in(folder)]


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> LocalDisk:
    (tmp_path / "disk").mkdir()
    return LocalDisk(tmp_path / "disk")


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_shared_disk_does_not_fill_the_machines_disk(
    shared: Path, disk: LocalDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain.dist, "get_world_size", lambda: 1)
    copies = Drain(disk, shared, 0, 3, (), timedelta(seconds=60))
    with monkeypatch.context() as patch:
        patch.setattr(naming, "put_in_place", no_room)
        for step in (3, 6, 9):
            copies.begin(complete(disk.folder, step))
            copies.wait(0.1, lambda copied: None)
            assert names_in(disk.folder) == [name_of(step)] and names_in(shared) == []
            ended = copies.take()
            assert ended is not None and ended.problem == "rank 0: No space left on device"
    with pytest.raises(CheckpointError, match=rf"{name_of(9)} could not be copied"):
        copies.check_last()
    copies.begin(complete(disk.folder, 12))
    copies.wait(0.1, lambda copied: None)
    assert names_in(shared) == names_in(disk.folder) == [name_of(12)] and not list(shared.glob(".step*"))


def test_a_save_leaves_what_was_copied_to_the_step_at_which_all_ranks_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank may know of a copy before another: callbacks of both must be told of it at once."""

    class Idle:
        has_ended_one = True

        def take(self) -> None:
            raise AssertionError("taken by one rank alone")

    class Written:
        is_running = True

        def make_directory(self) -> None: ...

        def start(self, files: Any, in_thread: bool) -> None: ...

    found: Any = object.__new__(saver.Saver)
    found._drain, found._writing, found.memory, found.trained = Idle(), None, None, ()
    found.options, found.engine, found.weights = SimpleNamespace(end_ids=()), None, None
    monkeypatch.setattr(saver.Saver, "_check_masters", lambda self, step: None)
    monkeypatch.setattr(saver, "_Writing", lambda *_: Written())
    monkeypatch.setattr(saver, "loss_scale", lambda engine: {})
    monkeypatch.setattr(saver, "take_snapshot", lambda *_: None)
    assert found.save(Progress(step=3)) is None and found.is_due is True


@pytest.mark.parametrize("is_intact", [True, False])
def test_a_file_is_linked_only_if_it_is_intact(tmp_path: Path, is_intact: bool) -> None:
    source, former, target = (tmp_path / name for name in ("source", "former", "target"))
    source.write_bytes(b"whole")
    former.write_bytes(b"whole" if is_intact else b"whole"[::-1])
    record = record_file(source)
    copy_file(FileCopy(str(source), str(target), record.bytes, record.xxh3_128, str(former)))
    assert target.read_bytes() == b"whole" and target.samefile(former) == is_intact


@pytest.fixture
def start(shared: Path, tmp_path: Path) -> Callable[[str], LocalDisk]:
    """Start the run on a machine, from the newest shared checkpoint."""

    def on(machine: str) -> LocalDisk:
        run: Any = SimpleNamespace(
            output=str(shared.parent), checkpoint=SimpleNamespace(local=str(tmp_path / machine), local_copies=1)
        )
        found = prepare_local_disk(run, ResumePoint(checkpoints_in(shared)[0].resolve()), RankInfo(0, 1, 0))
        assert found is not None
        return found

    return on


def test_a_machine_that_comes_back_does_not_bring_the_steps_that_were_given_up(
    shared: Path, tmp_path: Path, start: Callable[[str], LocalDisk]
) -> None:
    complete(shared, 3)
    complete(start("a").folder, 9)
    assert names_in(start("b").folder) == [], "the run goes on from step 3 without the first machine"
    complete(shared, 6)
    assert bring_back(str(tmp_path / "a"), shared, 6, 0) == (None, ())
    assert names_in(shared) == [name_of(6), name_of(3)]


def test_a_start_keeps_the_directory_of_the_machines_that_take_part(
    shared: Path, tmp_path: Path, start: Callable[[str], LocalDisk]
) -> None:
    complete(shared, 3)
    complete(start("a").folder, 3)
    again = start("a")
    assert names_in(again.folder) == [name_of(3)] and [*again.folder.parent.iterdir()] == [again.folder]
    complete(again.folder, 9)
    path, notes = bring_back(str(tmp_path / "a"), shared, 3, 0)
    assert path == shared / name_of(9) and "was copied from the disks" in notes[-1]


def test_a_complete_checkpoint_is_not_given_up_for_want_of_room(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(tmp_path / "a" / draw_token(shared), 9)
    for function in ("copy_file", "naming.put_in_place"):
        with monkeypatch.context() as patch:
            patch.setattr(f"megatron_ds.checkpoint.local_disks.{function}", no_room)
            with pytest.raises(CheckpointError, match=rf"{name_of(9)} is complete in .*could not be copied .*No space"):
                bring_back(str(tmp_path / "a"), shared, -1, 0)
    assert bring_back(str(tmp_path / "a"), shared, -1, 0)[0] == shared / name_of(9)


def test_a_machines_disk_that_cannot_be_read_is_named(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_token(shared)

    def unreadable(folder: Path) -> list[Path]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(local_disks, "checkpoints_in", unreadable)
    with pytest.raises(CheckpointError, match=r"checkpoint\.local=.* cannot be read on .* \(Input/output error\)"):
        bring_back(str(tmp_path / "a"), shared, -1, 0)


class Ranks:
    """Ranks that are threads of this process, and gather objects from one another."""

    def __init__(self, number: int) -> None:
        self._barrier, self._slots, self._own = (
            threading.Barrier(number, timeout=20),
            [None] * number,
            threading.local(),
        )

    def gather(self, local: Any) -> list[Any]:
        self._slots[self._own.rank] = local
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    def run(self, act: Callable[[int], Any]) -> list[Any]:
        def work(rank: int) -> Any:
            self._own.rank = rank
            return act(rank)

        with ThreadPoolExecutor(len(self._slots)) as pool:
            return list(pool.map(work, range(len(self._slots))))


FILES = {"one.json": b"1", "two.json": b"2"}


@pytest.mark.parametrize(
    ("damaged", "is_whole"),
    [
        ({}, True),
        ({"a": [PROGRESS, *FILES]}, True),
        ({"b": [PROGRESS, *FILES]}, True),
        ({"a": [PROGRESS], "b": [*FILES]}, True),
        ({"a": [PROGRESS], "b": [PROGRESS]}, False),
    ],
    ids=["none", "all of the first", "all of the second", "each others", "both the same"],
)
def test_a_damaged_file_is_taken_from_another_machine(
    damaged: dict[str, list[str]], is_whole: bool, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, ranks = draw_token(shared), Ranks(2)
    for machine in "ab":
        complete(tmp_path / machine / token, 9, FILES)
        for name in damaged.get(machine, []):
            file = tmp_path / machine / token / name_of(9) / name
            file.write_bytes(b"x" * file.stat().st_size)
    monkeypatch.setattr(local_disks, "gather_objects", ranks.gather)
    for name in ("run_on_all_ranks", "run_long_on_all_ranks"):
        monkeypatch.setattr(local_disks, name, lambda step: step())
    found = ranks.run(lambda rank: bring_back(str(tmp_path / "ab"[rank]), shared, -1, rank))
    assert found[0][0] == found[1][0] == (shared / name_of(9) if is_whole else None)
    assert names_in(shared) == ([name_of(9)] if is_whole else []) and not list(shared.glob(".step*"))
    assert first_damage(shared / name_of(9)) is None or not is_whole
    notes = " ".join(found[0][1])
    assert ("no machine has" in notes) != is_whole
    assert "does not match its checksum" in notes or len(damaged) != 1, "of each machine, some files were tried first"
