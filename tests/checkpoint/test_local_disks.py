"""Checkpoints on the machines' own disks: they reach the shared one, and a run continues from the newest of all.

Two ranks have one machine's disk, or one each, as on two machines.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint import directory as naming
from megatron_ds.checkpoint import drain, neighbour_copies
from megatron_ds.checkpoint.directory import checkpoints_in, name_of
from megatron_ds.checkpoint.local_disks import TOKEN
from megatron_ds.checkpoint.reader import first_damage
from megatron_ds.errors import CheckpointError, ConfigError, LaunchError
from megatron_ds.training import resume
from tests.checkpoint.test_faults import STEPS, die_at, go_on, losses, tiny_run, uncut

__all__ = ["uncut"]


@pytest.fixture(params=[pytest.param(False, marks=pytest.mark.sweep), True], ids=["one", "two"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """The directory of a rank's machine; `checkpoint.local` is the one above them."""
    folder = tmp_path / "disks"

    def of(rank: int) -> Path:
        return folder / str(rank * request.param)

    own_disks(monkeypatch, of)
    return of


def own_disks(monkeypatch: pytest.MonkeyPatch, of: Callable[[int], Path]) -> None:
    """Give each rank the disk of its machine."""
    make, back = resume.make_local_disk, resume.bring_back
    monkeypatch.setattr(resume, "make_local_disk", lambda _, *more: make(str(of(int(os.environ["RANK"]))), *more))
    monkeypatch.setattr(resume, "bring_back", lambda _, *more: back(str(of(int(os.environ["RANK"]))), *more))


def local_of(output: Path, disk: Path) -> list[str]:
    """Names of the checkpoints of a run on a machine's disk, newest first."""
    token = (output / "checkpoints" / TOKEN).read_text().strip()
    return [path.name for path in checkpoints_in(disk / token)]


def names_in(output: Path) -> list[str]:
    return [path.name for path in checkpoints_in(output / "checkpoints")]


def never(self: Any, checkpoint: Any, target: Path) -> None:
    """A shared disk that does not answer."""
    time.sleep(600)


def test_checkpoints_reach_the_shared_disk(
    place: Callable[[int], Path], corpus: Path, tmp_path: Path, uncut: list[float]
) -> None:
    output = tmp_path / "run"
    go_on(corpus, output, checkpoint={"local": str(tmp_path / "disks"), "asynchronous": True})
    assert losses(output) == uncut
    newest = output / "checkpoints" / name_of(STEPS)
    assert names_in(output)[0] == newest.name and first_damage(newest) is None
    assert local_of(output, place(0)) == local_of(output, place(1)) == [newest.name], "earlier ones are gone there"
    saves = [json.loads(line) for line in (output / "checkpoints" / "saves.jsonl").read_text().splitlines()]
    steps = [one["step"] for one in saves]
    assert set(steps) <= {3, 6, 9, STEPS} and steps == sorted(steps) and steps[-1] == STEPS
    assert names_in(output) == [name_of(step) for step in steps[::-1][:3]]
    assert all(0 < one["local_s"] <= one["written_s"] and one["bytes"] > 0 and one["paused_s"] > 0 for one in saves)
    assert saves[-1]["path"] == str(newest)
    go_on(corpus, output, train={"steps": STEPS + 1}, checkpoint={"local": str(tmp_path / "disks")})
    assert names_in(output)[0] == name_of(STEPS + 1)


def test_a_run_continues_from_what_is_only_on_the_machines_disks(
    place: Callable[[int], Path], corpus: Path, tmp_path: Path, uncut: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, checkpoint = tmp_path / "run", {"local": str(tmp_path / "disks")}
    with monkeypatch.context() as patch:
        die_at(8, 1, patch)
        patch.setattr(drain.Drain, "_copy_files", never)
        with pytest.raises(LaunchError, match="rank 1 was killed by SIGKILL"):
            go_on(corpus, output, checkpoint=checkpoint)
    assert names_in(output) == [] and local_of(output, place(1)) == [name_of(6), name_of(3)]
    said = go_on(corpus, output, checkpoint=checkpoint)
    assert "resuming from step 6" in said
    assert losses(output) == uncut


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.sweep), 2])
def test_the_files_of_a_lost_machine_come_from_its_neighbour(
    ranks: int, corpus: Path, tmp_path: Path, uncut: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing reached the shared disk; the run continues on the machine that is left, or with a new one."""
    output, disks = tmp_path / "run", tmp_path / "disks"
    checkpoint = {"local": str(disks), "local_copies": 2}
    own_disks(monkeypatch, lambda rank: disks / str(rank))
    with monkeypatch.context() as patch:
        die_at(8, 1, patch)
        patch.setattr(drain.Drain, "_copy_files", never)
        patch.setattr(neighbour_copies, "_CHUNK_BYTES", 1000)  # files of many chunks
        with pytest.raises(LaunchError, match="rank 1 was killed by SIGKILL"):
            go_on(corpus, output, checkpoint=checkpoint)
    assert local_of(output, disks / "0") == local_of(output, disks / "1") == [name_of(6), name_of(3)]
    assert all(first_damage(path) is None for path in disks.glob("*/*/step_*"))
    shutil.rmtree(disks / "0")
    (disks / "1").rename(disks / ("0" if ranks == 1 else "1"))
    said = go_on(corpus, output, ranks, checkpoint=checkpoint, train={"micro_batch_size": 2})
    assert "resuming from step 6" in said
    assert losses(output) == (uncut if ranks == 2 else pytest.approx(uncut, rel=2e-5))


@pytest.mark.sweep
@pytest.mark.parametrize("harm", ["removed", "damaged"])
def test_what_is_not_complete_on_the_machines_disks_is_passed_over(
    harm: str,
    place: Callable[[int], Path],
    corpus: Path,
    tmp_path: Path,
    uncut: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files of the second rank are lost, and with them the later of the two checkpoints there."""
    output, checkpoint = tmp_path / "run", {"local": str(tmp_path / "disks")}
    with monkeypatch.context() as patch:
        die_at(8, 1, patch)
        patch.setattr(drain.Drain, "_copy_files", never)
        with pytest.raises(LaunchError):
            go_on(corpus, output, checkpoint=checkpoint)
    (file,) = place(1).glob(f"*/{name_of(6)}/training_state/state-00001-of-00002.safetensors")
    if harm == "removed":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    said = go_on(corpus, output, 1, checkpoint=checkpoint, train={"micro_batch_size": 8}) if harm == "removed" else ""
    said = said or go_on(corpus, output, checkpoint=checkpoint)
    both_here = place(0) == place(1) or harm == "damaged"
    assert ("resuming from step 3" in said) == both_here, "one rank does not see the other machine"
    assert losses(output)[-1] == pytest.approx(uncut[-1], rel=2e-5)


@pytest.mark.sweep
def test_a_run_that_starts_anew_does_not_read_the_copies_of_another(
    place: Callable[[int], Path], corpus: Path, tmp_path: Path, uncut: list[float]
) -> None:
    output, checkpoint = tmp_path / "run", {"local": str(tmp_path / "disks")}
    go_on(corpus, output, checkpoint=checkpoint)
    shutil.rmtree(output)
    said = go_on(corpus, output, checkpoint=checkpoint)
    assert "resuming" not in said.splitlines()[-1] and losses(output) == uncut


@pytest.mark.sweep
def test_a_full_shared_disk_costs_only_the_copies_that_it_does_not_take(
    place: Callable[[int], Path], corpus: Path, tmp_path: Path, uncut: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, checkpoint = tmp_path / "run", {"local": str(tmp_path / "disks")}
    put = naming.put_in_place

    def full(folder: Path, step: int) -> Path:
        if folder.name == "checkpoints" and step == STEPS:
            raise OSError(28, "No space left on device")
        return put(folder, step)

    with monkeypatch.context() as patch:
        patch.setattr(naming, "put_in_place", full)
        with pytest.raises(
            CheckpointError, match=rf"{name_of(STEPS)} could not be copied from .*: rank 0: No space left"
        ):
            go_on(corpus, output, checkpoint=checkpoint)
    assert name_of(STEPS) not in names_in(output) and local_of(output, place(1))[0] == name_of(STEPS)
    go_on(corpus, output, checkpoint=checkpoint)
    assert names_in(output)[0] == name_of(STEPS) and losses(output) == uncut


def test_no_checkpoints_need_no_disk(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.local=.* holds checkpoints, and checkpoint.every=0 writes none"):
        tiny_run(corpus, tmp_path / "run", checkpoint={"every": 0, "local": str(tmp_path / "disks")})
