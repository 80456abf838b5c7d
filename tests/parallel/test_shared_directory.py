"""A directory counts as shared only if every rank reads there what rank 0 has just written."""

import os
import threading
import time
from pathlib import Path

import pytest

from megatron_ds.parallel import shared_directory
from megatron_ds.parallel.agreement import Council
from megatron_ds.parallel.shared_directory import LEFT_OVER_S, check_shared, wait_for_text
from tests.parallel.test_agreement import together


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_directory, "SEEN_WITHIN_S", 0.3)


def check_on_machines(folder: Path, output: str, key: str = "output") -> list[str]:
    """What three ranks raise; each pair of ranks has its own working directory, as if it were its machine's disk."""

    def act(council: Council) -> None:
        machine = folder / f"machine{council.info.rank // 2}"
        machine.mkdir(exist_ok=True)
        os.chdir(machine)
        check_shared(council, {key: output} if council.info.rank == 0 else {})

    found = [str(one) for one in together(act, 3, local_ranks=2)]
    left = [path for path in folder.rglob("*") if path.name.startswith(".megatron_ds")]
    assert not left, "the token is removed"
    return found


def test_a_shared_directory_passes_whether_it_exists_or_not(tmp_path: Path) -> None:
    assert check_on_machines(tmp_path, str(tmp_path / "shared" / "runs" / "out")) == ["None"] * 3
    (tmp_path / "shared").mkdir()
    assert check_on_machines(tmp_path, str(tmp_path / "shared")) == ["None"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["machine0", "machine1", "shared"], "nothing is made"


@pytest.mark.parametrize("left_over", [True, False])
def test_directories_of_the_same_name_are_refused_on_every_rank(tmp_path: Path, left_over: bool) -> None:
    if left_over:
        for machine in ("machine0", "machine1"):
            (tmp_path / machine / "out" / "checkpoints" / ".step_00000003.tmp" / "training_state").mkdir(parents=True)
    line = (
        "ConfigError: output=out is not one directory that all ranks share: what rank 0 writes there is not seen by "
        "rank 2; choose a place on a disk that all machines share"
    )
    assert check_on_machines(tmp_path, "out") == [line, "SystemExit: 2", line]


def test_a_directory_of_one_machine_below_a_shared_one_is_refused(tmp_path: Path) -> None:
    """The nearest directory that rank 0 sees is shared, but another machine has its own at the place of the output."""
    (tmp_path / "shared").mkdir()
    place = tmp_path / "shared" / "out"

    def act(council: Council) -> None:
        if council.info.rank == 1:
            seen = Path.exists
            Path.exists = lambda self, **_: self == place or seen(self)  # type: ignore[method-assign,assignment]
        check_shared(council, {"output": str(place)} if council.info.rank == 0 else {})

    assert "is not seen by rank 1" in str(together(act, 2)[0])


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    def act(council: Council) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        Path.write_text = full  # type: ignore[method-assign,assignment]
        check_shared(council, {"output": str(tmp_path / "out")})

    zero, _ = together(act, 2)
    assert zero == (
        f"ConfigError: output={tmp_path}/out cannot be written ({tmp_path}: No space left on device); choose another "
        "place"
    )


def test_a_file_that_is_shown_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    assert not wait_for_text(file, "x")
    monkeypatch.setattr(shared_directory, "SEEN_WITHIN_S", 5.0)
    timer = threading.Timer(0.2, lambda: file.write_text("x"))
    timer.start()
    assert wait_for_text(file, "x")
    timer.join()
    monkeypatch.setattr(shared_directory, "SEEN_WITHIN_S", 0.05)
    assert not wait_for_text(file, "y")


def test_old_tokens_of_killed_runs_are_removed(tmp_path: Path) -> None:
    old, new = (tmp_path / f".megatron_ds-shared-{name}" for name in ("old", "new"))
    for file in (old, new):
        file.touch()
    os.utime(old, times=(0, time.time() - LEFT_OVER_S - 1))
    assert together(lambda council: check_shared(council, {"output": str(tmp_path)}), 2) == [None, None]
    assert new.exists() and not old.exists()


def test_a_removed_directory_that_a_network_disk_still_shows_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale, opened = tmp_path / "out", []
    exists, opens = Path.exists, os.open

    def open_(path: Path, flags: int) -> int:
        opened.append(path)
        return opens(path, flags)

    (tmp_path / ".megatron_ds-shared-token").write_text("token")
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(Path, "exists", lambda self: (self == stale and stale not in opened) or exists(self))
    assert shared_directory._sees(str(stale), 1, "token")
