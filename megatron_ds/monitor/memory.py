"""Peak memory of a rank: what torch allocated on its GPU, or what was resident of its process on a CPU.

The numbers are kept on the host: reading them waits for no kernel. torch is imported when they are read, since this
module is loaded before the number of threads, which torch reads when it is imported, has been set.
"""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class PeakMemory(NamedTuple):
    """Peaks in bytes.

    Attributes:
        used_bytes: of the tensors on a GPU, or of the resident memory of a process on a CPU.
        reserved_bytes: memory that torch's allocator held on a GPU, tensors and free blocks; None on a CPU.
    """

    used_bytes: int
    reserved_bytes: int | None


class MemoryMeter:
    """Peaks of this rank's memory between one call and the next.

    A GPU's peaks are reset at each call. The resident peak of a process is the one since it started.

    Args:
        device: the rank's device.

    Attributes:
        largest_bytes: the largest peak so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.largest_bytes = device, 0

    def take(self) -> PeakMemory:
        """Return the peaks since the last call, and reset them."""
        if self._device.type == "cuda":
            import torch

            found = torch.cuda.memory_stats(self._device)
            peak = PeakMemory(found["allocated_bytes.all.peak"], found["reserved_bytes.all.peak"])
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            peak = PeakMemory(_resident_peak_bytes(), None)
        self.largest_bytes = max(self.largest_bytes, peak.used_bytes)
        return peak


def _resident_peak_bytes() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
