"""Locks exclude other processes, with flock and without; a dead owner's lock is taken over by one process, once."""

import errno
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from megatron_ds.checkpoint.directory import lock
from megatron_ds.errors import CheckpointError
from megatron_ds.locks import FileLock, LockHeldError, mounts, owner_record
from megatron_ds.locks.mounts import flock_is_local
from megatron_ds.locks.owner_record import Owner, _Watch, this_process

LIMIT_S = 20.0
Spawn = Callable[[Callable[[], object]], int]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts a function in a fork, which exits with status 0 if it returns; left-over processes are killed."""
    pids = []

    def start(act: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                act()
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
        return pid

    yield start
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock, and hearts that beat a hundred times as fast."""

    def missing(*_: object) -> NoReturn:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(owner_record, "BEAT_S", 0.05)
    monkeypatch.setattr(owner_record, "MISSED_BEATS", 8)


def elsewhere() -> None:
    """Let this process be one of another machine."""
    own = replace(this_process(), host="node2", boot="another")
    owner_record.this_process = lambda: replace(own, pid=os.getpid())  # type: ignore[assignment]


def hold(path: Path, on_lost: Callable[[str], None] | None = None, *, remote: bool = False) -> None:
    """Take the lock, say so in a file beside it, and wait to be killed."""
    if remote:
        elsewhere()
    held = FileLock(path, on_lost)
    held.acquire()
    path.with_name("held").touch()
    time.sleep(LIMIT_S)


def wait_for(file: Path) -> None:
    until = time.monotonic() + LIMIT_S
    while not file.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def records(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".owner-" in path.name)


def test_flock_excludes_until_the_process_ends(tmp_path: Path, spawn: Spawn) -> None:
    path = tmp_path / ".lock"
    pid = spawn(lambda: hold(path))
    wait_for(tmp_path / "held")
    with pytest.raises(LockHeldError):
        FileLock(path).acquire(blocking=False)
    kill(pid)
    with FileLock(path) as held:
        held.acquire()  # it holds it already
        assert os.WEXITSTATUS(os.waitpid(spawn(lambda: FileLock(path).acquire(blocking=False)), 0)[1]) == 1
    FileLock(path).acquire(blocking=False)
    assert records(tmp_path) == []


def test_a_fork_does_not_release_the_lock_of_its_parent(tmp_path: Path, spawn: Spawn) -> None:
    path = tmp_path / ".lock"
    held = FileLock(path)
    held.acquire()
    os.waitpid(spawn(held.release), 0)
    with pytest.raises(LockHeldError):
        FileLock(path).acquire(blocking=False)


@pytest.mark.usefixtures("without_flock")
def test_without_flock_a_dead_process_of_this_machine_is_seen_at_once(
    tmp_path: Path, spawn: Spawn, caplog: pytest.LogCaptureFixture
) -> None:
    pid = spawn(lambda: hold(tmp_path / ".lock"))
    wait_for(tmp_path / "held")
    logging.getLogger("megatron_ds").propagate = True
    with pytest.raises(CheckpointError, match=rf"is being written by another run \(.*, pid {pid}\); wait for its end"):
        lock(tmp_path)
    kill(pid)
    began_s = time.monotonic()
    held = lock(tmp_path)
    assert time.monotonic() - began_s < 0.3
    assert f"pid {pid}, which has ended without releasing it" in caplog.text
    held.release()
    FileLock(tmp_path / ".lock").acquire(blocking=False)
    assert records(tmp_path) == [".lock.owner-00000003"], "numbers never repeat, and one record stays"


@pytest.mark.usefixtures("without_flock")
def test_an_owner_on_another_machine_is_believed_as_long_as_it_gives_signs_of_life(
    tmp_path: Path, spawn: Spawn
) -> None:
    path = tmp_path / ".lock"
    pid = spawn(lambda: hold(path, remote=True))
    wait_for(tmp_path / "held")
    with pytest.raises(LockHeldError) as caught:
        FileLock(path).acquire(blocking=False)
    assert caught.value.owner == f"node2, pid {pid}"
    kill(pid)
    began_s = time.monotonic()
    FileLock(path).acquire(blocking=False)
    assert time.monotonic() - began_s > 0.05 * 8, "it counts missed beats, and compares no clocks"


@pytest.mark.usefixtures("without_flock")
def test_an_owner_that_was_suspended_learns_who_has_its_lock(tmp_path: Path, spawn: Spawn) -> None:
    path = tmp_path / ".lock"
    pid = spawn(lambda: hold(path, lambda owner: (tmp_path / "lost").write_text(owner) and None, remote=True))
    wait_for(tmp_path / "held")
    os.kill(pid, signal.SIGSTOP)
    held = FileLock(path)
    held.acquire(blocking=False)
    os.kill(pid, signal.SIGCONT)
    wait_for(tmp_path / "lost")
    time.sleep(0.1)
    assert (tmp_path / "lost").read_text() == this_process().describe()
    with pytest.raises(LockHeldError):
        spawned = FileLock(path)
        spawned.acquire(blocking=False)
    held.release()


@pytest.mark.usefixtures("without_flock")
def test_one_of_many_that_wait_takes_a_dead_owners_lock(tmp_path: Path, spawn: Spawn) -> None:
    path = tmp_path / ".lock"
    pid = spawn(lambda: hold(path, remote=True))
    wait_for(tmp_path / "held")
    kill(pid)

    def attempt() -> None:
        elsewhere()
        held = FileLock(path)
        try:
            held.acquire(blocking=False)
        except LockHeldError:
            (tmp_path / f"refused {os.getpid()}").touch()
            return
        (tmp_path / f"taken {os.getpid()}").touch()
        time.sleep(LIMIT_S)

    for _ in range(5):
        spawn(attempt)
    until = time.monotonic() + LIMIT_S
    while len(list(tmp_path.glob("taken *")) + list(tmp_path.glob("refused *"))) < 5:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert len(list(tmp_path.glob("taken *"))) == 1


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize("content", [b"", b"[1", b'{"host": 1, "odd": 2}'])
def test_a_damaged_record_counts_as_an_owner_that_gives_no_sign(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".lock.owner-00000041").write_bytes(content)
    FileLock(tmp_path / ".lock").acquire(blocking=False)
    assert records(tmp_path) == [".lock.owner-00000042"]


@pytest.mark.usefixtures("without_flock")
def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> NoReturn:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with FileLock(tmp_path / "a"), pytest.raises(LockHeldError):
        FileLock(tmp_path / "a").acquire(blocking=False)
    FileLock(tmp_path / "a").acquire(blocking=False)


def test_a_process_id_of_another_process_or_machine_proves_nothing() -> None:
    here = this_process()
    assert here.is_running() is True
    assert replace(here, started="1").is_running() is False, "another process with its number"
    assert replace(here, boot="another").is_running() is None
    assert replace(here, pid_space="pid:[1]").is_running() is None, "a container"
    assert Owner("node2", 1).is_running() is None


def test_a_disk_that_was_away_for_a_while_is_no_missed_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watch, states = _Watch(), []
    for passed_s in [5.0] * 11 + [600.0] + [5.0] * 12:
        states.append(watch.look(1, b"a"))
        now += passed_s
    assert set(states) == {""}
    assert watch.look(1, b"a") == "dead"
    assert watch.look(1, b"b") == "alive" and watch.look(2, b"a") == ""


@pytest.mark.parametrize(
    ("line", "is_local"),
    [
        ("36 1 0:40 / {} rw,relatime shared:1 - nfs4 server:/x rw,vers=4.2,local_lock=none", False),
        ("36 1 0:40 / {} rw,relatime shared:1 - nfs server:/x rw,vers=3,nolock,local_lock=all", True),
        ("36 1 0:40 / {} rw,relatime - lustre mgs@tcp:/x rw,flock", False),
        ("36 1 0:40 / {} rw,relatime - lustre mgs@tcp:/x rw,localflock", True),
        ("36 1 0:40 / {}/other rw - nfs server:/x rw,nolock", False),
    ],
)
def test_mounts_whose_flock_other_machines_do_not_see(
    line: str, is_local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mountinfo"
    root = "25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
    table.write_text(root + line.format(str(tmp_path).replace(" ", "\\040")) + "\n")
    monkeypatch.setattr(mounts, "MOUNTS", table)
    assert flock_is_local(tmp_path) is is_local
    with FileLock(tmp_path / ".lock"):
        assert bool(records(tmp_path)) is is_local
