"""Variables and switches of a rank's device, set in a forked process and read back."""

import os
from typing import Any

import pytest
import torch

from megatron_ds.engine import DeviceSettings, device_settings, start_distributed
from megatron_ds.errors import ConfigError
from megatron_ds.parallel.launch import RankInfo
from tests.ranks import run_alone, run_local_ranks

SET = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
DETERMINISTIC = DeviceSettings(deterministic=True)


def variables(settings: DeviceSettings, **given: str) -> dict[str, str]:
    environ = dict(given)
    settings.set_environment(environ)
    return environ


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_set_where_neither_of_its_names_is(name: str) -> None:
    assert variables(DeviceSettings()) == SET
    given = {name: "max_split_size_mb:512"}
    assert variables(DeviceSettings(), **given) == given


def test_tensor_ranks_before_blackwell_have_one_connection_unless_gathers_run_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_settings, "_is_blackwell", lambda: False)
    one = {**SET, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert variables(DeviceSettings(tensor=2, zero_stage=2)) == one
    assert variables(DeviceSettings(tensor=2, zero_stage=3)) == variables(DeviceSettings(tensor=1)) == SET
    assert variables(DeviceSettings(tensor=2), CUDA_DEVICE_MAX_CONNECTIONS="8")["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    monkeypatch.setattr(device_settings, "_is_blackwell", lambda: True)
    assert variables(DeviceSettings(tensor=2)) == SET


@pytest.mark.parametrize(("major", "is_blackwell"), [(9, False), (10, True), (12, True), (None, False)])
def test_nvml_tells_the_generation(monkeypatch: pytest.MonkeyPatch, major: int | None, is_blackwell: bool) -> None:
    class Nvml:
        def nvmlInit_v2(self) -> int:
            return 0 if major is not None else 9  # the driver is not loaded

        def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
            return index

        def nvmlDeviceGetCudaComputeCapability(self, handle: Any, found: Any, minor: Any) -> int:
            found._obj.value = major
            return 0

    monkeypatch.setattr(device_settings.ctypes, "CDLL", lambda name: Nvml())
    assert device_settings._is_blackwell() is is_blackwell


def test_a_deterministic_run_has_a_repeatable_workspace() -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    assert name not in variables(DeviceSettings())
    assert variables(DETERMINISTIC)[name] == ":4096:8"
    assert variables(DETERMINISTIC, **{name: ":16:8"})[name] == ":16:8"
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:2 in .*; nearest: :4096:8$"):
        variables(DETERMINISTIC, **{name: ":4096:2"})


def test_a_process_that_uses_cuda_already_becomes_deterministic_only_with_the_workspace_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="before this process uses CUDA; try a fresh process"):
        variables(DETERMINISTIC)
    variables(DETERMINISTIC, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    variables(DeviceSettings(tf32=True))


def switches() -> tuple[bool, bool, str]:
    fills: Any = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        fills.fill_uninitialized_memory,
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize(
    ("device", "deterministic", "tf32", "expected"),
    [
        ("cuda", False, False, (False, True, "highest")),
        ("cuda", True, False, (True, False, "highest")),
        ("cuda", False, True, (False, True, "high")),
        ("cuda", True, True, (True, False, "high")),
        ("cpu", True, True, (False, True, "highest")),
    ],
)
def test_switches_of_torch(device: str, deterministic: bool, tf32: bool, expected: tuple[bool, bool, str]) -> None:
    settings = DeviceSettings(deterministic=deterministic, tf32=tf32)

    def inside() -> Any:
        settings.set_switches(torch.device(device))
        return switches(), torch.backends.cuda.matmul.allow_tf32

    assert run_alone(inside) == (expected, expected[2] == "high")


def test_a_rank_has_its_variables_and_on_a_gpu_its_switches() -> None:
    def rank(info: RankInfo) -> Any:
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
            os.environ.pop(name, None)
        device = start_distributed(info, settings=DETERMINISTIC)
        found = os.environ["PYTORCH_ALLOC_CONF"], os.environ["CUBLAS_WORKSPACE_CONFIG"]
        return found, switches()[0] == (device.type == "cuda")

    assert run_local_ranks(rank, 1) == [(("expandable_segments:True", ":4096:8"), True)]


def test_tf32_is_refused_without_products_in_fp32_and_named_where_it_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, cuda = DeviceSettings(tf32=True), torch.device("cuda")
    settings.check_precision("fp32")
    DeviceSettings().check_precision("bf16")
    for precision in ("bf16", "fp16"):
        with pytest.raises(ConfigError, match=f"computes in {precision}; try train.tf32=false$"):
            settings.check_precision(precision)
    assert settings.describe_idle(torch.device("cpu")) == "train.tf32=true does nothing on a device of type cpu"
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 0))
    assert settings.describe_idle(cuda) == "train.tf32=true does nothing on Tesla V100-SXM2-32GB, which has no TF32"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    assert settings.describe_idle(cuda) is DeviceSettings().describe_idle(cuda) is None
