"""Profile of a step: the kernels that take the time, the share in which the device is busy, and the host's waits."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu.host_waits import host_waits
from bench.gpu.record import DEVICE, record, synchronize
from bench.gpu.trace import summarize

NUM_PLACES = 12


def profile(name: str, step: Callable[[], object], steps: int = 2) -> None:
    """Record the profile of a step in the section "profile"; does nothing on a CPU.

    Args:
        name: the result that it belongs to, as "section, name".
        step: the step; it has been warmed up.
        steps: number of profiled steps.
    """
    if DEVICE != "cuda":
        return
    waits = host_waits(step)
    events = _trace(step, steps)
    found = summarize(events, steps)
    record("profile", name, None, **found, host_waits=sum(waits.values()), waits=waits.most_common(NUM_PLACES))


def _trace(step: Callable[[], object], steps: int) -> list[dict[str, Any]]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return list(json.loads(path.read_text())["traceEvents"])
