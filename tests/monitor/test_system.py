"""Readings of a machine: this one's, and those of a machine with two GPUs, by a stand-in for NVML's bindings."""

import logging
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ds.monitor import SystemMeter, system


class NVMLError(Exception):
    """Base of the stand-in's errors, as of NVML's."""


def nvml(power_mw: dict[int, int]) -> ModuleType:
    """The functions of `pynvml` that torch calls, of two GPUs; the second does not tell its utilisation."""
    module = ModuleType("pynvml")

    def utilization(handle: int) -> Any:
        if handle == 1:
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=87, memory=40)

    def power(handle: int) -> int:
        if handle not in power_mw:
            raise NVMLError("GPU is lost")
        return power_mw[handle]

    module.__dict__.update(
        NVMLError_DriverNotLoaded=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=1000 + handle),
        nvmlDeviceGetUtilizationRates=utilization,
        nvmlDeviceGetTemperature=lambda handle, sensor: 60 + handle,
        nvmlDeviceGetPowerUsage=power,
    )
    return module


@pytest.fixture
def power_mw(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Power by GPU, which a test may change."""
    power = {0: 300_000, 1: 250_500}
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml(power))
    monkeypatch.setattr(torch.cuda, "pynvml", nvml(power), raising=False)
    monkeypatch.setattr(torch.cuda, "_HAS_PYNVML", True)
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", lambda device: device or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(system, "find_spec", lambda name: True)
    monkeypatch.setattr(logging.getLogger("megatron_ds"), "propagate", True)
    return power


def test_two_gpus(power_mw: dict[int, int], caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    meter = SystemMeter(lambda: now[0])
    assert caplog.messages == ["system metrics that cannot be read here are left out: gpu1_utilization_percent"]
    found = {name: value for name, value in meter.take().items() if name.startswith("gpu")}
    assert found == {
        "gpu0_memory_bytes": 1000.0,
        "gpu0_utilization_percent": 87.0,
        "gpu0_temperature_celsius": 60.0,
        "gpu0_power_watts": 300.0,
        "gpu1_memory_bytes": 1001.0,
        "gpu1_temperature_celsius": 61.0,
        "gpu1_power_watts": 250.5,
    }
    power_mw[0] = 100_000
    now[0] = 0.9
    assert meter.take()["gpu0_power_watts"] == 300.0, "read at most once a second"
    now[0] = 1.0
    assert meter.take()["gpu0_power_watts"] == 100.0
    del power_mw[1]
    for now[0] in (2.0, 3.0):
        assert "gpu1_power_watts" not in meter.take()
    assert caplog.messages[1:] == ["system metrics that cannot be read any more: gpu1_power_watts"]


def test_without_the_packages_there_is_nothing_to_read(
    power_mw: dict[int, int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "megatron_ds"):
        assert SystemMeter().take() == {}
    assert caplog.messages == ["no system metrics of GPUs: they need NVML; try pip install 'megatron-ds[nvml]'"]
