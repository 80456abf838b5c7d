"""Readings of rank 0's machine for trackers: its memory and processors by psutil, its GPUs by NVML through torch.

Both packages are optional. What the machine does not offer, such as the utilisation of a part of a GPU (MIG), is left
out. NVML averages utilisation and power over up to a second, so readings are repeated for as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec

from megatron_ds.log import get_logger

PERIOD_S = 1.0

Reading = Callable[[], float]


class SystemMeter:
    """Readings by name, with their units: `host_memory_bytes`, `gpu0_power_watts`, ...

    GPUs are those that the process can see, by their number among them.

    Args:
        clock: monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._read_at = clock, -PERIOD_S
        self._readings = {**_of_the_host(), **_of_the_gpus()}
        self._values: dict[str, float] = {}
        failed = [name for name in self._readings if not self._reads(name)]
        if failed:
            get_logger().warning("system metrics that cannot be read here are left out: %s", ", ".join(failed))
        self._forget(failed)

    def take(self) -> dict[str, float]:
        """Return all readings; they are at most `PERIOD_S` old. One that fails is reported, and left out from then."""
        now = self._clock()
        if now - self._read_at >= PERIOD_S:
            self._read_at = now
            failed = [name for name in self._readings if not self._reads(name)]
            if failed:
                get_logger().warning("system metrics that cannot be read any more: %s", ", ".join(failed))
            self._forget(failed)
        return dict(self._values)

    def _reads(self, name: str) -> bool:
        try:
            self._values[name] = float(self._readings[name]())
        except Exception:  # NVML's errors have no base class that torch exposes; the caller reports the name
            return False
        return True

    def _forget(self, names: list[str]) -> None:
        for name in names:
            del self._readings[name]
            self._values.pop(name, None)


def _of_the_host() -> dict[str, Reading]:
    if find_spec("psutil") is None:
        return {}
    import psutil

    process = psutil.Process()
    psutil.cpu_percent(None)  # the next call returns the mean since this one
    return {
        "host_memory_bytes": lambda: psutil.virtual_memory().used,
        "host_cpu_percent": lambda: psutil.cpu_percent(None),
        "process_memory_bytes": lambda: process.memory_info().rss,
    }


def _of_the_gpus() -> dict[str, Reading]:
    import torch

    if not torch.cuda.is_available():
        return {}
    if torch.version.hip is None and find_spec("pynvml") is None:
        get_logger().info("no system metrics of GPUs: they need NVML; try pip install 'megatron-ds[nvml]'")
        return {}
    kinds: dict[str, Callable[[int], float]] = {
        "memory_bytes": torch.cuda.device_memory_used,
        "utilization_percent": torch.cuda.utilization,
        "temperature_celsius": torch.cuda.temperature,
        "power_watts": lambda gpu: torch.cuda.power_draw(gpu) / 1000,
    }
    return {
        f"gpu{gpu}_{name}": lambda read=read, gpu=gpu: read(gpu)  # type: ignore[misc]
        for gpu in range(torch.cuda.device_count())
        for name, read in kinds.items()
    }
