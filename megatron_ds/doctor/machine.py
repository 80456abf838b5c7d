"""Cores, memory, shared memory, limits, clock and disk of this machine."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from megatron_ds.doctor.finding import Finding, note, problem

_GIB = 2**30
_MIB = 2**20
LEAST_SHARED_BYTES = 300 * _MIB
FEWEST_FILES = 4096
"""Open files that a rank of a large job should be able to have: connections to all others, and weight files."""
SLOWEST_DISK = 100e6
"""Bytes per second below which the disk delays checkpoints."""
_TIME_ERROR = 5  # of adjtimex: the clock is not synchronized


def find_machine() -> Iterator[Finding]:
    """Yield cores, memory, shared memory, limits and the clock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cpu_share()
    allowed = f"; this process may use {cores}" if cores != os.cpu_count() else ""
    if share is not None and share < cores:
        fix = f"OMP_NUM_THREADS={max(1, int(share))}, divided by the ranks of this machine"
        yield note("cores", f"{os.cpu_count()}{allowed}; the container gets the time of {share:g}", fix)
    else:
        yield Finding("cores", f"{os.cpu_count()}{allowed}")
    yield find_memory()
    if sys.platform == "linux":
        yield compare_shared_memory(Path("/dev/shm"))
        yield compare_clock(_clock_state())
    yield compare_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def cpu_share(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Return the number of cores whose time a container gets; None = no limit."""
    try:
        quota, period = file.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def find_memory(limit_file: Path = Path("/sys/fs/cgroup/memory.max")) -> Finding:
    """Return the memory of the machine, and the limit of its container."""
    found = psutil.virtual_memory()
    value = f"{found.total / _GIB:.1f} GiB, {found.available / _GIB:.1f} available"
    try:
        limit = int(limit_file.read_text())
    except (OSError, ValueError):  # no control groups, or "max"
        return Finding("memory", value)
    if limit >= found.total:
        return Finding("memory", value)
    return Finding("memory", f"{value}; the container is killed above {limit / _GIB:.1f} GiB")


def compare_shared_memory(folder: Path) -> Finding:
    """Return the size of the file system that ranks of one machine, NCCL and data workers exchange through."""
    fix = f"a larger mount (docker run --shm-size=8g) of at least {LEAST_SHARED_BYTES // _MIB} MiB"
    if not folder.is_dir():
        return note("shared memory", f"there is no {folder}", fix)
    usage = shutil.disk_usage(folder)
    value = f"{usage.total / _MIB:,.0f} MiB at {folder}, {usage.free / _MIB:,.0f} free"
    return note("shared memory", value, fix) if usage.free < LEAST_SHARED_BYTES else Finding("shared memory", value)


def compare_open_files(soft: int, hard: int) -> Finding:
    """Return the limit of open files of a process."""
    if soft == resource.RLIM_INFINITY or soft >= FEWEST_FILES:
        return Finding("open files", "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft:,}")
    allowed = hard == resource.RLIM_INFINITY or hard >= FEWEST_FILES
    fix = "ulimit -n 65536" if hard == resource.RLIM_INFINITY or hard >= 65536 else f"ulimit -n {hard}"
    fix = fix if allowed else "a higher hard limit in /etc/security/limits.conf"
    return note("open files", f"up to {soft:,}; hundreds of ranks need {FEWEST_FILES:,}", fix)


def _clock_state() -> int | None:
    """Return what the kernel says of the clock; None if it cannot be asked."""
    try:
        return ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(256))
    except (OSError, AttributeError):
        return None


def compare_clock(state: int | None) -> Finding:
    """Return whether the clock is kept in time, by the return value of `adjtimex`.

    The logs of ranks on machines with different times cannot be put in order.
    """
    value = time.strftime("%Y-%m-%d %H:%M:%S %z")
    if state == _TIME_ERROR:
        fix = "chrony or systemd-timesyncd if there are several machines, whose logs are compared by time"
        return note("clock", f"{value}, not synchronized", fix)
    return Finding("clock", value + (", synchronized" if state is not None and state >= 0 else ""))


def find_disk(folder: Path, num_bytes: int = 256 * _MIB) -> Finding:
    """Return the space in a folder and the speed at which a file reaches its disk.

    Args:
        folder: where runs write.
        num_bytes: of the file that is written, and removed.
    """
    name = f"disk at {folder}"
    usage = shutil.disk_usage(folder)
    space = f"{usage.free / _GIB:,.1f} of {usage.total / _GIB:,.1f} GiB free"
    if usage.free < 2 * num_bytes:
        return problem(name, space, "to free some space, or --path DIR on another disk")
    try:
        speed = write_speed(folder, num_bytes)
    except OSError as failure:
        reason = (failure.strerror or str(failure)).lower()
        return problem(name, f"{space}, but nothing can be written there: {reason}", "--path DIR on another disk")
    value = f"{space}, writes {speed / 1e6:,.0f} MB/s"
    if speed < SLOWEST_DISK:
        return note(name, value, "a faster disk for checkpoints, or a larger checkpoint.every")
    return Finding(name, value)


def write_speed(folder: Path, num_bytes: int) -> float:
    """Return the bytes per second at which a new file is written and has reached the disk.

    Raises:
        OSError: the file cannot be written.
    """
    block = os.urandom(_MIB)
    with tempfile.TemporaryFile(dir=folder) as file:
        began_s = time.perf_counter()
        for _ in range(num_bytes // _MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return num_bytes / (time.perf_counter() - began_s)
