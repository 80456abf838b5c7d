"""Profiles made of given times: which numbers become the device's speed."""

import pytest

from megatron_ds.planner.operations import Attention, Product, Stream
from megatron_ds.planner.profiles import find_device
from megatron_ds.planner.profiles.from_measurements import Facts, build_device
from megatron_ds.planner.profiles.link import Link, MeasuredTime
from megatron_ds.planner.timing import roofline

TIMED = [
    (Product(4096, 4096, 4096), 2 * 4096**3 / 600e12),
    (Product(4096, 4096, 4096, dtype="float32"), 2 * 4096**3 / 50e12),
    (Attention(1, 8, 8, 128, 2048, 2048, 2048 * 2048), 4 * 128 * 2048**2 * 8 / 400e12),
    (Attention(1, 8, 8, 128, 2048, 2048, 2048 * 2048, True), 10 * 128 * 2048**2 * 8 / 300e12),
    (Stream(1 << 30), (1 << 30) / 3e12),
    (Stream(1024), 5e-6),
]


def test_a_known_gpu_keeps_its_peak_and_its_link() -> None:
    device = build_device("mine", Facts("cuda", "NVIDIA H100 80GB HBM3", 132, 85 * 10**9, 1), TIMED, [])
    assert device.peak_flops("bfloat16") == 989e12 and device.peak_flops("float32") == pytest.approx(50e12)
    assert device.products.sustained == pytest.approx(600 / 989, rel=1e-3)
    assert device.attention.forward == pytest.approx(400 / 989, rel=1e-3)
    assert device.attention.backward == pytest.approx(300 / 989, rel=1e-3)
    assert device.memory_gb_s == pytest.approx(3000) and device.streams.launch_us == pytest.approx(5)
    assert (device.link, device.network) == ("nvlink4", "400Gb/s")
    for operation, time_s in TIMED:
        assert roofline.seconds(operation, device) == pytest.approx(time_s, rel=0.01)


def test_numbers_that_no_measurement_shows_are_those_of_the_known_gpu() -> None:
    """Peaks in fp8, the time of the host; and of the streams the largest counts, which no cache holds."""
    known, cached = find_device("h100"), (Stream(1 << 24), (1 << 24) / 9e12)
    device = build_device("mine", Facts("cuda", "NVIDIA H100 80GB HBM3", 132, 85 * 10**9, 1), [*TIMED, cached], [])
    assert device.peak_flops("float8_e4m3fn") == 1979e12
    assert device.products.sustained_fp8 == known.products.sustained_fp8
    assert (device.host_us, device.host_gb_s) == (known.host_us, known.host_gb_s)
    assert device.memory_gb_s == pytest.approx(3000)


def test_an_unknown_gpu_has_its_best_products_as_peaks() -> None:
    device = build_device("mine", Facts("cuda", "NVIDIA X1", 100, 85 * 10**9, 2), TIMED, _rows())
    assert device.peak_flops("bfloat16") == pytest.approx(600e12) and device.products.sustained == 1.0
    assert isinstance(device.link, Link) and len(device.link.measured) == 4


def test_the_formula_of_a_measured_link_meets_the_ends_of_its_times() -> None:
    link = build_device("mine", Facts("cpu", None, 1, 8 * 10**9, 2), TIMED, _rows()).link
    assert isinstance(link, Link) and link.message is not None
    assert 2 * link.ring.step_s(1000 / 2) == pytest.approx(100e-6, rel=0.01)
    assert 2 * link.ring.step_s(10**7 / 2) == pytest.approx(10_100e-6, rel=0.01)
    assert link.message.step_s(10**7) == pytest.approx(5050e-6, rel=0.01)


def _rows() -> list[MeasuredTime]:
    return [
        MeasuredTime(kind="all_reduce", ranks=2, num_bytes=1000, us=100),
        MeasuredTime(kind="all_reduce", ranks=2, num_bytes=10**7, us=10_100),
        MeasuredTime(kind="message", ranks=2, num_bytes=1000, us=50),
        MeasuredTime(kind="message", ranks=2, num_bytes=10**7, us=5050),
    ]
