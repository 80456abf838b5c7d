"""Profile and memory of the devices of this machine, found without starting CUDA, so that ranks can be forked."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from megatron_ds.planner.plan_input import Machines
from megatron_ds.planner.profiles import Device, find_by_gpu, find_device

CPU_PROFILE, UNKNOWN_GPU_PROFILE = "cpu", "h100"
"""Profiles of a core, and of a GPU that no profile describes: then its memory alone is its own."""
_GIB = 1 << 30
_EVEN_TASKS = re.compile(r"([1-9]\d{0,5})(?:\(x\d+\))?")
"""A number of ranks of each machine; Slurm writes `8(x2)` for eight on each of two."""
_NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE


class Gpu(NamedTuple):
    """A GPU: the driver's name of it, and its memory."""

    name: str
    memory_bytes: int


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def first_gpu() -> Gpu | None:
    """Return the first GPU that NVIDIA's driver lists; None if NVML cannot be asked. Does not start CUDA."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES), _Memory()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
        or nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_BYTES))
        or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    )
    return None if failed else Gpu(name.value.decode(errors="replace"), memory.total)


def host_memory_bytes(limit_file: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Return the memory of this machine, or of its container if that is less."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(limit_file.read_text()))
    except (OSError, ValueError):  # no control groups, or "max"
        return total


def this_device(device_type: str, ranks_here: int) -> Device | None:
    """Return the profile of the devices of this machine, with the memory that a rank has.

    Args:
        device_type: torch's name, `cpu` or `cuda`.
        ranks_here: ranks that share the memory of this machine, on a CPU.

    Returns:
        None if the GPU cannot be asked for its memory.
    """
    if device_type == "cpu":
        core = find_device(CPU_PROFILE)
        return core.model_copy(update={"memory_gib": host_memory_bytes() / ranks_here / _GIB})
    gpu = first_gpu()
    if gpu is None:
        return None
    found = find_by_gpu(gpu.name) or find_device(UNKNOWN_GPU_PROFILE)
    return found.model_copy(update={"memory_gib": gpu.memory_bytes / _GIB})


def machines_here(world_size: int, device_type: str, environ: Mapping[str, str] = os.environ) -> Machines:
    """Return the machines of a job of this process, by what its launcher set; a job without one is on this machine.

    Args:
        world_size: number of ranks.
        device_type: torch's name, `cpu` or `cuda`.
        environ: the environment.
    """
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    found = (_EVEN_TASKS.fullmatch(environ.get(name, "")) for name in names)
    given = next((one[1] for one in found if one is not None), "")
    here = int(given) if given and world_size % int(given) == 0 else world_size
    return Machines(world_size // here, here, "cpu" if device_type == "cpu" else "cuda")
