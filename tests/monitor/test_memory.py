"""Peaks of memory: resident ones of this process, and those of a GPU between two calls."""

import numpy as np
import pytest
import torch

from megatron_ds.monitor import MemoryMeter
from tests.ranks import run_alone


def test_the_resident_peak_of_a_process_grows_with_what_it_touches() -> None:
    def inside() -> tuple[int, int, int]:
        meter = MemoryMeter(torch.device("cpu"))
        before = meter.take().used_bytes
        held = np.ones(2**26, dtype=np.uint8)
        after = meter.take().used_bytes
        del held
        return before, after, meter.largest_bytes

    before, after, largest = run_alone(inside)
    assert 0.8 * 2**26 <= after - before <= 1.5 * 2**26
    assert largest == after


def test_peaks_of_a_gpu_begin_anew_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, resets = [300, 100], list[torch.device]()

    def memory_stats(device: torch.device) -> dict[str, int]:
        return {"allocated_bytes.all.peak": peaks[len(resets)], "reserved_bytes.all.peak": 1000}

    monkeypatch.setattr(torch.cuda, "memory_stats", memory_stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    device = torch.device("cuda", 3)
    meter = MemoryMeter(device)
    assert (meter.take(), meter.take()) == ((300, 1000), (100, 1000))
    assert resets == [device, device] and meter.largest_bytes == 300
