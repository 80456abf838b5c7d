"""Freed memory is used again without new pages, unless the user has set the C library's own variables."""

import ctypes
import platform
import resource

import pytest
import torch

from megatron_ds.engine.host_memory import keep_freed_memory
from tests.ranks import run_alone

ELEMENTS = 2**24  # 64 MiB, which glibc always returns to the system by itself


def _faults_of_touching_again() -> int:
    """The fewest page faults of several tensors: the first ones may leave gaps that are a few bytes too small."""
    counts = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(ELEMENTS).fill_(1.0)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts[1:])


def _faults(environment: dict[str, str]) -> tuple[bool, int]:
    library = ctypes.CDLL(None)
    for threshold in (-1, -3):  # as at the start of a process: a test before this one may have kept memory
        library.mallopt(threshold, 2**17)
    library.malloc_trim(0)
    return keep_freed_memory(environment), _faults_of_touching_again()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_used_again() -> None:
    kept, faults = run_alone(_faults, {"PATH": "/bin"})
    assert kept and faults < 16, "not even huge pages of 2 MiB are touched"
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        kept, faults = run_alone(_faults, {name: ""})
        assert not kept and faults > 16, "the user's settings stay"
