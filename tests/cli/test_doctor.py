"""`megatron-ds doctor`: its output, its exit status, ranks that communicate, and sums that are wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.cli.main import _run
from megatron_ds.doctor import ranks
from megatron_ds.errors import LaunchError
from tests.ranks import preload


@pytest.fixture(autouse=True)
def _preloaded() -> None:
    preload()


def test_a_machine_that_works(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert _run(["doctor", "--nproc", "2", "--path", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for title in ("packages", "devices", "machine", "network", "ranks"):
        assert f"\n{title}\n" in shown
    assert "  ok       torch" in shown and str(tmp_path) in shown
    assert "2 ranks over gloo on cpu: sums are right, 1 MiB in" in shown
    assert shown.splitlines()[-1].startswith("no problem") and not [*tmp_path.iterdir()]


def test_sums_that_are_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.distributed.all_reduce

    def off_by_one(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        work = real(tensor, *args, **options)
        tensor[-1] += 1
        return work

    monkeypatch.setattr(ranks.dist, "all_reduce", off_by_one)
    assert _run(["doctor", "--nproc", "2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ranks"][0]["level"] == "problem"
    assert "sums of 1,048,576 bytes, 67,108,864 bytes are wrong" in found["ranks"][0]["value"]


def test_ranks_that_do_not_answer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(fn: Any, num_ranks: int, timeout_s: float) -> Any:
        raise LaunchError(f"timed out after {timeout_s:g} s; ranks still running: 0, 1\nstack of rank 0:\n...")

    monkeypatch.setattr(ranks, "run_local", hang)
    assert _run(["doctor", "--nproc", "2"]) == 1
    shown = capsys.readouterr().out
    assert "  problem  collectives" in shown and "timed out after 120 s" in shown
    assert "1 problem" in shown.splitlines()[-1]


def test_a_directory_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["doctor", "--path", "no/such"]) == 2
    assert capsys.readouterr().err == "error: --path=no/such is not a directory; try one in which runs write\n"
