"""Profiles by name and by file: all that are shipped, and messages about what is wrong."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_ds.errors import ConfigError
from megatron_ds.monitor import peak_flops
from megatron_ds.planner.calibration.calibrate import write_profile
from megatron_ds.planner.operations import Product, Stream
from megatron_ds.planner.profiles import (
    device_names,
    find_by_gpu,
    find_device,
    find_network,
    measured_file_name,
    shipped,
)
from megatron_ds.planner.profiles.from_measurements import Facts, build_device
from megatron_ds.planner.profiles.link import Link
from megatron_ds.planner.timing import roofline

CPU = """
source: a test
type: cpu
tflops: {float32: 0.1}
memory_gib: 8
memory_gb_s: 20
products: {sustained: 1.0, fill_us: 0, num_cores: 1, tiles: [{m: 1, n: 1}]}
attention: {forward: 0.5, backward: 0.5, fill_keys: 0, fill_dim: 0}
streams: {share: 1.0, launch_us: 5}
link: gloo
"""


@pytest.mark.parametrize("name", device_names())
def test_every_shipped_profile_loads_with_its_link_and_its_usual_network(name: str) -> None:
    device = find_device(name.upper(), measured=False)
    network = find_network(None, device, 8)
    assert device.name == name and device.source.endswith(".") and isinstance(network.inside, Link)
    assert isinstance(device.link, str)
    assert device.link.startswith(("pcie", "gloo")) or network.outside.ring.gb_s < network.inside.ring.gb_s
    assert network.inside.source.endswith(".") and network.outside.source.endswith(".")


@pytest.mark.parametrize("name", [name for name in device_names() if name not in ("cpu", "v100-32")])
def test_the_peak_of_a_gpu_is_that_of_the_monitor(name: str) -> None:
    device = find_device(name)
    assert device.gpu is not None
    assert device.peak_flops("bfloat16") == peak_flops(device.gpu, "bf16")
    assert device.peak_flops("tf32") == peak_flops(device.gpu, "fp32", tf32=True)
    assert device.peak_flops("float32") < device.peak_flops("tf32")


def test_a_v100_computes_fp16_but_not_bf16_in_tensor_cores() -> None:
    device = find_device("v100-32")
    assert device.peak_flops("float16") == 125e12 and device.peak_flops("bfloat16") == 15.7e12


@pytest.mark.parametrize(
    ("gpu", "name"),
    {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100 80GB PCIe": "a100-pcie",
        "NVIDIA A100-PCIE-40GB": "a100-40",
        "NVIDIA H200": "h200",
        "NVIDIA GH200 120GB": "gh200",
        "AMD Instinct MI300X": "mi300x",
        "Tesla V100-SXM2-16GB": "v100-32",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "NVIDIA T1000": None,
        "NVIDIA GeForce RTX 4090": None,
    }.items(),
)
def test_a_gpu_is_known_by_the_name_that_its_driver_reports(gpu: str, name: str | None) -> None:
    found = find_by_gpu(gpu)
    assert (found.name if found is not None else None) == name


def test_a_file_of_a_user_is_read_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CPU)
    device = find_device(str(path))
    assert device.name == "mine" and device.memory_bytes == 8 << 30
    assert find_network("ethernet 2x10Gb/s", device, 4).outside.ring.gb_s == pytest.approx(2 * 1.25 / 4 * 0.8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("memory_gib: 8\n", ""), "memory_gib is missing"),
        (("memory_gib: 8", "memory_gib: -8"), "memory_gib=-8"),
        (("memory_gib: 8", "memory_gb: 8"), "memory_gb"),
        (("link: gloo", "link: glo"), "link=glo is not a known link; did you mean gloo?"),
        (("type: cpu", "type: tpu"), "type=tpu"),
        (("source: a test", "source: [1"), "line"),
    ],
)
def test_a_wrong_value_of_a_file_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CPU.replace(*change))
    with pytest.raises(ConfigError) as caught:
        find_device(str(path))
    assert str(path) in str(caught.value) and message in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10", "--device=h10 is not a known device; did you mean h100"),
        ("xyz", "legal here: a10, a100-40"),
        ("no/such.yaml", "profile no/such.yaml does not exist"),
    ],
)
def test_an_unknown_device_names_those_near(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_device(name)


@pytest.mark.parametrize(
    ("text", "gb_s"),
    {
        "400Gb/s": 50.0,
        "roce 400Gb/s": 50.0,
        "infiniband 4x200Gb/s": 12.5,
        "4 x 200 Gbps": 12.5,
        "50GB/s": 50.0,
    }.items(),
)
def test_a_network_is_the_speed_of_its_cards_divided_among_the_gpus_of_a_node(text: str, gb_s: float) -> None:
    assert find_network(text, find_device("h100"), 8).outside.ring.gb_s == pytest.approx(0.94 * gb_s)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("400", "is not the speed of network cards; try 400Gb/s"),
        ("infinband 400Gb/s", "did you mean infiniband"),
        ("0Gb/s", "has no speed"),
        ("0x400Gb/s", "has no speed"),
    ],
)
def test_a_text_that_is_no_network_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_network(text, find_device("h100"), 8)


def test_the_documentation_lists_every_device() -> None:
    text = (Path(__file__).parents[3] / "docs" / "planning.md").read_text()
    listed = text.partition("## Profiles of devices and networks")[2].partition("Each is a short")[0]
    assert re.findall(r"`([a-z][a-z0-9-]+)`", listed) == device_names()


def test_a_file_of_measured_times_next_to_a_shipped_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `h100.measured.yaml` in their folder, `h100` has its measured rows, and its own numbers for all others."""
    plain = find_device("h100", measured=False)
    timed = [(Product(4096, 4096, 4096), 250e-6), (Product(64, 64, 64, dtype="float32"), 9e-6), (Stream(1 << 30), 4e-4)]
    assert plain.gpu is not None
    found = build_device("here", Facts("cuda", plain.gpu, 132, 85 * 10**9, 1), timed, [])
    assert measured_file_name(found) == "h100.measured.yaml"
    folder = shutil.copytree(Path(shipped.__file__).parent, tmp_path / "profiles")
    write_profile(found, folder / "devices" / measured_file_name(found))
    monkeypatch.setattr(shipped, "_FOLDER", folder)
    shipped._shipped_device.cache_clear()
    try:
        device, without = find_device("h100"), find_device("h100", measured=False)
        names = device_names()
    finally:
        shipped._shipped_device.cache_clear()
    assert "h100.measured" not in names and "h100" in names
    assert without == plain and device.measured_products == found.measured_products
    assert (device.name, device.link, device.memory_gb_s) == ("h100", plain.link, plain.memory_gb_s)
    assert device.source == f"{plain.source} {found.source}"
    for operation, time_s in timed:
        assert roofline.seconds(operation, device) == pytest.approx(time_s, rel=0.01)
    assert find_device(str(folder / "devices" / "h100.measured.yaml")).name == "h100.measured"


@pytest.mark.parametrize(
    ("gpu", "name"), [("NVIDIA X1 (80 GB)", "nvidia-x1-80-gb.measured.yaml"), (None, "cpu.measured.yaml")]
)
def test_names_of_measured_profiles_that_none_is_shipped_for(gpu: str | None, name: str) -> None:
    cpu = find_device("cpu", measured=False)
    assert measured_file_name(cpu.model_copy(update={"gpu": gpu})) == name


def test_a_rack_is_one_island() -> None:
    assert find_network(None, find_device("gb200"), 4).island == 72
    assert find_network(None, find_device("h100"), 4).island == 4
