"""Peaks by the names that drivers report: neighbours in the table are not confused, and others have none."""

import pytest

from megatron_ds.monitor import peak_flops

BF16 = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "A100-SXM4-40GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA A30": 165,
    "NVIDIA A40": 149.7,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H800": 989,
    "NVIDIA H800 PCIe": 756,
    "NVIDIA H20": 148,
    "NVIDIA H20-3e": 148,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA GH200 120GB": 989,
    "NVIDIA GH200 144G HBM3e": 989,
    "NVIDIA B200": 2250,
    "NVIDIA B300 SXM6 AC": 2250,
    "NVIDIA GB200": 2500,
    "NVIDIA GB300": 2500,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165.2,
    "AMD Instinct MI300X": 1307.4,
}
UNKNOWN = (
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H200 MIG 1g.18gb",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA A1000",
    "NVIDIA RTX A1000",
    "NVIDIA H2000",
    "AMD Instinct MI250X",
    "",
)


@pytest.mark.parametrize(("name", "tflops"), BF16.items())
def test_each_name_has_its_own_peak(name: str, tflops: float) -> None:
    assert peak_flops(name, "bf16") == peak_flops(name, "fp16") == pytest.approx(tflops * 1e12)
    assert peak_flops(name, "fp32") is None, "no tensor cores"
    assert peak_flops(name, "fp32", tf32=True) == pytest.approx(tflops * 1e12 / 2)


@pytest.mark.parametrize("name", UNKNOWN)
def test_slices_of_a_device_and_other_devices_have_none(name: str) -> None:
    assert [peak_flops(name, precision, tf32=True) for precision in ("bf16", "fp16", "fp32")] == [None] * 3


@pytest.mark.parametrize(("name", "tflops"), {"Tesla V100-SXM2-32GB": 125, "Tesla V100-PCIE-16GB": 112}.items())
def test_a_v100_has_a_peak_in_fp16_alone(name: str, tflops: float) -> None:
    assert peak_flops(name, "fp16") == tflops * 1e12
    assert peak_flops(name, "bf16") is peak_flops(name, "fp32", tf32=True) is None
