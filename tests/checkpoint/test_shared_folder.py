"""A checkpoint is begun only in a directory that every rank sees, whatever earlier tries have left on its disk."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ds.checkpoint.saver import _Writing
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel import shared_directory
from megatron_ds.parallel.consensus import gather_objects
from megatron_ds.parallel.launch import RankInfo
from tests.ranks import run_ranks

LEFT_OVER = Path("checkpoints") / ".step_00000003.tmp" / "training_state"


def begin(info: RankInfo, folder: Path, machines: int) -> str:
    """The error of a rank that begins to save step 3; ranks of other machines have other disks."""
    os.chdir(folder / f"machine{info.rank % machines}")
    saver: Any = SimpleNamespace(
        options=SimpleNamespace(folder=Path("checkpoints"), disk=None),
        engine=SimpleNamespace(grid=SimpleNamespace(rank=info.rank)),
        gather=gather_objects,
        naming_rank=0,
    )
    progress: Any = SimpleNamespace(step=3)
    try:
        _Writing(saver, progress, 0.0, 0.0).make_directory()
    except CheckpointError as problem:
        return str(problem)
    return ""


def test_a_left_over_is_no_proof_of_a_shared_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_directory, "SEEN_WITHIN_S", 0.3)
    for machine in ("machine0", "machine1"):
        (tmp_path / machine / LEFT_OVER).mkdir(parents=True)
    for error in run_ranks(begin, 2, tmp_path, 2):
        assert "step_00000003 could not be saved: rank 1: checkpoints is not on a disk that all machines share" in error


def test_the_token_is_gone_before_files_are_written(tmp_path: Path) -> None:
    (tmp_path / "machine0").mkdir()
    assert run_ranks(begin, 2, tmp_path, 1) == ["", ""]
    assert [path.name for path in (tmp_path / "machine0" / LEFT_OVER).parent.iterdir()] == ["training_state"]
