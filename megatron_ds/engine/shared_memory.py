"""All-reduces over the ranks of one machine through shared memory: DeepSpeed's CPU kernel instead of gloo's TCP.

The kernel adds in the same order on every rank, and waits by spinning, so each rank needs its own core. It supports one
group only, all ranks, and never removes its files in /dev/shm; here they are removed once every rank has mapped them.
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

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ds.cache import cache_folder
from megatron_ds.errors import ConfigError
from megatron_ds.locks import FileLock
from megatron_ds.parallel.consensus import run_on_all_ranks
from megatron_ds.parallel.grid import Grid

FIELD = "parallel.shared_memory=true"
FOLDER = Path("/dev/shm")
SEGMENT_BYTES = 69_206_024  # of one rank, mapped by all ranks; DeepSpeed 0.19.8
LARGEST_BYTES = 2**31 - 2**25  # the kernel counts them in an int, 2^25 at a time
LEVELS = {
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 2,
}  # of vector instructions: AVX2, AVX-512 BW


def enable_shared_memory(grid: Grid) -> Grid:
    """Return the grid with a tensor axis that sums through shared memory. Collective over the world.

    At its first use on a machine the kernel is compiled, which takes half a minute, and kept in the cache.

    Args:
        grid: a grid of several tensor ranks, one data rank and one pipeline stage.

    Raises:
        ConfigError: there is no compiler, /dev/shm is too small, or the ranks do not share it.
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
    """A function for `Axis.sum_here`."""

    def __init__(self, level: int) -> None:
        self._dtypes = {dtype for dtype, needed in LEVELS.items() if needed <= level}

    def __call__(self, x: Tensor) -> bool:
        if x.dtype not in self._dtypes or not x.is_contiguous() or x.nbytes > LARGEST_BYTES:
            return False
        if x.numel():
            torch.ops.deepspeed.inference_all_reduce_(x)
        return True


def _load(ranks: int) -> Any:
    """Return DeepSpeed's module; compile it if the cache does not have it. Does not communicate."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ConfigError(
            f"{FIELD} needs Linux on x86-64, whose memory ordering DeepSpeed's kernel relies on, and this is "
            f"{platform.system()} on {platform.machine()}; try false"
        )
    if FOLDER.is_dir() and not os.access(FOLDER, os.W_OK):
        raise ConfigError(f"{FIELD} needs {FOLDER}, which cannot be written here; try false")
    free = shutil.disk_usage(FOLDER).free if FOLDER.is_dir() else 0
    if free < ranks * SEGMENT_BYTES:
        raise ConfigError(
            f"{FIELD} needs {ranks * SEGMENT_BYTES / 1e6:.0f} MB of {FOLDER} for {ranks} ranks, and "
            f"{free / 1e6:.0f} MB are free; try false, or for a container docker run --shm-size=1g"
        )
    built_with = "|".join((torch.__version__, torch.__file__, deepspeed.__version__, sys.version))
    key = hashlib.sha256(built_with.encode()).hexdigest()[:16]
    cache = cache_folder("kernels") / key
    # ninja is next to Python, also in a venv that is not active
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    output = io.StringIO()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"), _environment(TORCH_EXTENSIONS_DIR=str(cache), PATH=tools):
        for left in cache.rglob("lock"):  # torch's, of a process that was killed: the build would wait for it forever
            left.unlink()
        try:
            with contextlib.redirect_stdout(output):
                module = ShareMemCommBuilder().load(verbose=False)
        except (RuntimeError, OSError, ImportError) as problem:
            why = _reason(f"{output.getvalue()}\n{problem}")
            raise ConfigError(
                f"{FIELD} needs DeepSpeed's kernel, which cannot be compiled here ({why}); "
                "try false, or install g++ and the headers of Python"
            ) from None
    if module.vector_kernel_level() < min(LEVELS.values()):
        raise ConfigError(f"{FIELD} needs a processor with AVX2; try false")
    return module


def _reason(output: str) -> str:
    """Return the line of the output of ninja and the compiler that names the error, without their command lines."""
    lines = [
        line.strip() for line in output.splitlines() if line.strip() and not line.startswith(("[", "Error building"))
    ]
    errors = [line for line in lines if re.search(r"error|not found|No space|Killed|denied", line)]
    return (errors or lines[-1:] or ["no reason given"])[0]


def _agree(grid: Grid) -> str:
    """Agree on a unique name, of which rank 0 creates a file. Collective over the world."""
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
            "rank 0; try false"
        )


def _remove(name: str, rank: int) -> None:
    """Remove this rank's files from the folder; mappings of them stay valid."""
    for left in FOLDER.glob(f"*_{name}_{rank}"):
        left.unlink()
    if rank == 0:
        _mark(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables within the block and restore them after it."""
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
