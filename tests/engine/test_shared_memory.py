"""Sums through the memory of a machine: what they give, what is left behind, and where they are refused."""

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.cache import cache_folder
from megatron_ds.engine import enable_shared_memory, shared_memory
from megatron_ds.errors import ConfigError
from megatron_ds.parallel.collectives import all_reduce_, begin_all_reduce_
from megatron_ds.parallel.grid import Grid, Layout
from tests.ranks import run_grid

SIZES = [0, 1, 7, 1000, 262_144, 262_147, 1_000_001, 9_000_001]  # across the kernel's 1 MiB and 32 MiB
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64]


def _directly(grid: Grid) -> Grid:
    """Without agreement between ranks, so that each rank shows its own refusal."""
    shared_memory.run_on_all_ranks = lambda step: step()
    return enable_shared_memory(grid)


def _sums(grid: Grid) -> list[str]:
    """What is wrong."""
    shared = _directly(grid).tensor
    wrong = []
    for dtype in DTYPES:
        for size in SIZES:
            each = [(torch.arange(size) % 61 + rank).to(dtype) for rank in range(grid.tensor.size)]
            wanted = torch.stack(each).sum(0)
            found = all_reduce_(each[grid.rank].clone(), shared)
            waited = each[grid.rank].clone()
            work = begin_all_reduce_(waited, shared)
            if work is not None:
                work.wait()
            if not (torch.equal(found, wanted) and torch.equal(waited, wanted)):
                wrong.append(f"{dtype} {size}")
    largest = all_reduce_(torch.tensor([float(grid.rank)]), shared, torch.distributed.ReduceOp.MAX)
    if float(largest) != grid.tensor.size - 1:
        wrong.append("maximum")
    return wrong


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    """What this test's run is called, that of no other."""
    drawn = uuid.uuid4()
    monkeypatch.setattr(shared_memory.uuid, "uuid4", lambda: drawn)
    return drawn.hex


def _left(name: str) -> list[str]:
    return [path.name for path in Path("/dev/shm").iterdir() if name in path.name]


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums(ranks: int, name: str) -> None:
    assert run_grid(_sums, Layout(tensor=ranks)) == [[]] * ranks
    assert not _left(name)


def _refused(grid: Grid, change: Any) -> str:
    change(grid)
    try:
        _directly(grid)
    except ConfigError as problem:
        torch.distributed.barrier()  # a rank that leaves early breaks the connections that others still make
        return str(problem)
    return "not refused"


def small_folder(grid: Grid) -> None:
    usage = shutil.disk_usage(shared_memory.FOLDER)
    shutil.disk_usage = lambda path: usage._replace(free=64_000_000)  # type: ignore[assignment]


def no_folder(grid: Grid) -> None:
    shared_memory.FOLDER = Path("/nowhere")


def read_only(grid: Grid) -> None:
    os.access = lambda path, mode: False  # type: ignore[assignment]


def an_arm(grid: Grid) -> None:
    shared_memory.platform.machine = lambda: "aarch64"  # type: ignore[assignment]


def no_compiler(grid: Grid) -> None:
    os.environ["XDG_CACHE_HOME"] = os.environ["ELSEWHERE"]
    os.environ["CXX"] = "no-such-compiler"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (small_folder, "needs 138 MB of /dev/shm for 2 ranks, and 64 MB are free; try false, or for a container"),
        (no_folder, "needs 138 MB of /nowhere for 2 ranks, and 0 MB are free"),
        (read_only, "needs /dev/shm, which cannot be written here; try false"),
        (
            an_arm,
            "needs Linux on x86-64, whose memory ordering DeepSpeed's kernel relies on, and this is Linux on a",
        ),
        (no_compiler, "no-such-compiler"),
    ],
)
def test_what_every_rank_refuses(change: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSEWHERE", str(tmp_path))
    for said in run_grid(_refused, Layout(tensor=2), change):
        assert said.startswith("parallel.shared_memory=true ") and words in said, said
        assert "\n" not in said


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("[1/3] c++ -MMD -o error.o\nfailed\nx.h:3:10: fatal error: Python.h: No such file\n", "x.h:3:10: fatal error"),
        (
            "Error building extension 'x': [1/2] c++ -c\n/bin/sh: 1: c++: not found\nninja: stopped",
            "/bin/sh: 1: c++: not",
        ),
        ("cc1plus: No space left on device", "cc1plus: No space"),
        ("one\ntwo\n", "two"),
        ("", "no reason given"),
    ],
)
def test_the_reason_in_a_compilers_output(output: str, reason: str) -> None:
    assert shared_memory._reason(output).startswith(reason)


def test_what_the_kernel_cannot_count_goes_over_tcp() -> None:
    assert not shared_memory._Sum(2)(torch.empty((2**31 - 2**25) // 4 + 1, device="meta"))


def _on_another_machine(grid: Grid, folder: Path) -> str:
    if grid.rank == 1:
        shared_memory.FOLDER = folder
    try:
        enable_shared_memory(grid)
    except ConfigError as problem:
        return str(problem)
    except SystemExit as exit:
        return f"status {exit.code}"
    return "not refused"


def test_ranks_that_share_no_folder(tmp_path: Path, name: str) -> None:
    first, second = run_grid(_on_another_machine, Layout(tensor=2), tmp_path)
    assert "needs all ranks on one machine, or in one container" in first
    assert second == "status 2"
    assert not _left(name)


def _with_a_lock_left(grid: Grid) -> bool:
    for built in cache_folder("kernels").glob("*/deepspeed_shm_comm"):
        (built / "lock").touch()
    torch.distributed.barrier()
    return _directly(grid).tensor.sum_here(torch.ones(1))


def test_a_lock_left_by_a_killed_compiler_stops_nobody() -> None:
    assert run_grid(_with_a_lock_left, Layout(tensor=2)) == [True, True]
