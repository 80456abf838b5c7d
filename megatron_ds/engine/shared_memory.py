"""Sums over the ranks of one machine through its memory: DeepSpeed's kernel for CPUs in the place of gloo's TCP.

The kernel adds in the same order on every rank, and waits by spinning: one core a rank. It knows one group only,
all ranks, and leaves its files in /dev/shm to others; here they are removed as soon as every rank has mapped them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.cache import cache_folder
from megatron_ds.errors import ConfigError
from megatron_ds.parallel.consensus import run_on_all_ranks
from megatron_ds.parallel.grid import Grid

FIELD = "parallel.shared_memory=true"
FOLDER = Path("/dev/shm")
SEGMENT_BYTES = 69_206_024  # of a rank, mapped by all; DeepSpeed 0.19.8
LARGEST_BYTES = 2**31 - 2**25  # the kernel counts them in an int, 2^25 at a time
LEVELS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 2}  # of vector instructions: AVX2, AVX-512 BW


def enable_shared_memory(grid: Grid) -> Grid:
    """The grid, whose tensor axis sums through memory. Collective over the world, which the tensor axis spans.

    Compiles the kernel the first time on a machine, half a minute, and keeps it in the cache.

    Args:
        grid: of more than one tensor rank, one data rank and one stage.

    Raises:
        ConfigError: no compiler, too small a /dev/shm, or ranks that do not share one.
    """
    assert grid.tensor.size == grid.world.size > 1, grid.layout
    module = run_on_all_ranks(lambda: _load(grid.world.size))
    name = _agree(grid)
    try:
        run_on_all_ranks(lambda: _check_shared(name))
        with _environment(LOCAL_SIZE=str(grid.world.size), MASTER_ADDR="megatron_ds", MASTER_PORT=name):
            module.initialize(grid.world.size, grid.rank)  # waits for the segments of the others
        dist.barrier()
    finally:
        _remove(name, grid.rank)
    tensor = replace(grid.tensor, sum_here=_Sum(module.vector_kernel_level()))
    return replace(grid, axes={**grid.axes, "tensor": tensor})


class _Sum:
    """See `Axis.sum_here`."""

    def __init__(self, level: int) -> None:
        self._dtypes = {dtype for dtype, needed in LEVELS.items() if needed <= level}

    def __call__(self, x: Tensor) -> bool:
        if x.dtype not in self._dtypes or not x.is_contiguous() or x.nbytes > LARGEST_BYTES:
            return False
        if x.numel():
            torch.ops.deepspeed.inference_all_reduce_(x)
        return True


def _load(ranks: int) -> Any:
    """DeepSpeed's module, compiled where it is not yet. Does not communicate."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ConfigError(
            f"{FIELD} needs Linux on x86-64, for whose order of memory DeepSpeed's kernel is written, and this is "
            f"{platform.system()} on {platform.machine()}; nearest: false"
        )
    if FOLDER.is_dir() and not os.access(FOLDER, os.W_OK):
        raise ConfigError(f"{FIELD} needs {FOLDER}, which cannot be written here; nearest: false")
    free = shutil.disk_usage(FOLDER).free if FOLDER.is_dir() else 0
    if free < ranks * SEGMENT_BYTES:
        raise ConfigError(
            f"{FIELD} needs {ranks * SEGMENT_BYTES / 1e6:.0f} MB of {FOLDER} for {ranks} ranks, and "
            f"{free / 1e6:.0f} MB are free; nearest: false, or for a container docker run --shm-size=1g"
        )
    built_with = "|".join((torch.__version__, torch.__file__, deepspeed.__version__, sys.version))
    key = hashlib.sha256(built_with.encode()).hexdigest()[:16]
    cache = cache_folder("kernels") / key
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja, of no active venv
    said = io.StringIO()
    cache.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache / ".lock"), _environment(TORCH_EXTENSIONS_DIR=str(cache), PATH=tools):
        for left in cache.rglob("lock"):  # torch's, of a process that was killed: it would wait for it without end
            left.unlink()
        try:
            with contextlib.redirect_stdout(said):
                module = ShareMemCommBuilder().load(verbose=False)
        except (RuntimeError, OSError, ImportError) as problem:
            why = _reason(f"{said.getvalue()}\n{problem}")
            raise ConfigError(
                f"{FIELD} needs DeepSpeed's kernel, which cannot be compiled here ({why}); "
                "nearest: false, or install g++ and the headers of Python"
            ) from None
    if module.vector_kernel_level() < min(LEVELS.values()):
        raise ConfigError(f"{FIELD} needs a processor with AVX2; nearest: false")
    return module


def _reason(said: str) -> str:
    """What went wrong, out of all that ninja and the compiler say: their command lines are long."""
    lines = [
        line.strip() for line in said.splitlines() if line.strip() and not line.startswith(("[", "Error building"))
    ]
    telling = [line for line in lines if re.search(r"error|not found|No space|Killed|denied", line)]
    return (telling or lines[-1:] or ["for no reason that is told"])[0]


def _agree(grid: Grid) -> str:
    """A name that no other run has, and a file of that name left by rank 0."""
    box = [uuid.uuid4().hex]
    dist.broadcast_object_list(box, src=0)
    if grid.rank == 0:
        _mark(box[0]).touch()
    dist.barrier()
    return box[0]


def _mark(name: str) -> Path:
    return FOLDER / f"megatron_ds_{name}"


def _check_shared(name: str) -> None:
    if not _mark(name).exists():
        raise ConfigError(
            f"{FIELD} needs all ranks on one machine, or in one container, and this one does not see {FOLDER} of "
            "rank 0; nearest: false"
        )


def _remove(name: str, rank: int) -> None:
    """What this rank has put into the folder; what is mapped stays mapped."""
    for left in FOLDER.glob(f"*_{name}_{rank}"):
        left.unlink()
    if rank == 0:
        _mark(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """These variables inside, as before outside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
