"""Records of a part: a line of JSON for each result, with timing and memory of the device.

The environment says where and how: `DEVICE` ("cuda" or "cpu"), `TINY=1` (small shapes, to test the commands
themselves), `OUT` (the output directory) and `GPU_RESULTS` (the file of results; set by the driver).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

DEVICE = os.environ.get("DEVICE") or "cuda"
TINY = os.environ.get("TINY") == "1"
OUT = Path(os.environ.get("OUT") or "out/gpu")
RESULTS = Path(os.environ.get("GPU_RESULTS") or OUT / "results.jsonl")
BEGAN_S = float(os.environ.get("GPU_BEGAN") or time.time())

LONGEST_ERROR = 400  # characters
TURN = "GPU_TURN"
"""Set by the driver for a part that is started early, so that it imports while the part before it runs."""


def record(section: str, name: str, ok: bool | None = None, **found: Any) -> None:
    """Append a result to the file of results.

    Args:
        section: the group of results that it belongs to.
        name: the result's name, unique in the section.
        ok: True or False for a check; None for a figure.
        found: the figures, which JSON can hold.
    """
    row = {"section": section, "name": name, "ok": ok, **found, "at_s": round(time.time() - BEGAN_S, 1)}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:  # a line is one write, so that parts that run at the same time do not mix
        file.write(json.dumps(row, default=str) + "\n")


def guarded(section: str, name: str, act: Callable[[], T]) -> T | None:
    """Run `act` and return its result; an exception is recorded as a failed result, and None is returned."""
    try:
        return act()
    except Exception as problem:
        traceback.print_exc()
        message = " ".join(str(problem).split())[-LONGEST_ERROR:]
        record(section, name, False, error=f"{type(problem).__name__}: {message}")
        return None
    finally:
        release_memory()


def wait_for_turn() -> None:
    """Wait until the driver lets this part use the device. A part calls it after its imports."""
    if os.environ.pop(TURN, None):
        sys.stdin.readline()


def pick(full: T, tiny: T) -> T:
    """Return `tiny` if the commands themselves are tested, else `full`."""
    return tiny if TINY else full


# ---- the device ------------------------------------------------------------------------------------------------------


def torch_device() -> torch.device:
    """Return the device that is measured."""
    import torch

    return torch.device("cuda", 0) if DEVICE == "cuda" else torch.device("cpu")


def synchronize() -> None:
    """Wait until the device has done everything that was asked of it."""
    import torch

    if DEVICE == "cuda":
        torch.cuda.synchronize()


def release_memory() -> None:
    """Free what Python no longer refers to, and return the allocator's cache to the device."""
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and DEVICE == "cuda" and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reset_peak() -> None:
    """Begin a new measurement of the peak memory."""
    import torch

    if DEVICE == "cuda":
        torch.cuda.init()  # torch refuses to reset the statistics of a device that was not used yet
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    """Return the peak of the allocated memory since `reset_peak`, in GB (1e9); None on a CPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 1e9, 3) if DEVICE == "cuda" else None


@dataclass(frozen=True)
class Timing:
    """Durations of single runs, in seconds."""

    runs_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.runs_s)

    @property
    def ms(self) -> float:
        """The median in milliseconds, rounded."""
        return round(self.median_s * 1e3, 4)

    @property
    def spread(self) -> float:
        """The longest run relative to the median, minus 1."""
        return round(max(self.runs_s) / self.median_s - 1.0, 3)


def time_runs(act: Callable[[], object], *, warm_ups: int = 3, times: int = 10, budget_s: float = 3.0) -> Timing:
    """Time `times` runs of `act`, one after the other without waiting in between, as a training loop does.

    On CUDA, events between the runs measure the device's own time; on a CPU, the clock.

    Args:
        act: what is timed; it may or may not wait for the device.
        warm_ups: runs before the measurement, compilation included.
        times: number of measured runs.
        budget_s: fewer runs are made if these would take longer.
    """
    for _ in range(max(0, warm_ups - 1)):
        act()
    synchronize()
    began_s = time.perf_counter()
    act()
    synchronize()
    once_s = max(time.perf_counter() - began_s, 1e-6)
    times = max(1, min(times, int(budget_s / once_s)))
    return Timing(tuple(_timed_on_cuda(act, times) if DEVICE == "cuda" else _timed(act, times)))


def _timed_on_cuda(act: Callable[[], object], times: int) -> list[float]:
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        act()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def _timed(act: Callable[[], object], times: int) -> list[float]:
    found = []
    for _ in range(times):
        began_s = time.perf_counter()
        act()
        found.append(time.perf_counter() - began_s)
    return found
