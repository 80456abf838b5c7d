"""What is found on machines that lack something: each with the fix that its message names."""

import resource
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_ds.doctor import machine, network, packages
from megatron_ds.doctor.devices import compare_with_driver
from megatron_ds.doctor.finding import Finding, Level

H100 = ["NVIDIA H100 80GB HBM3, 570.86", "NVIDIA H100 80GB HBM3, 570.86"]


def only(findings: list[Finding]) -> Finding:
    (found,) = findings
    return found


@pytest.mark.parametrize(
    ("gpus", "kind", "cuda", "environ", "level", "words"),
    [
        ([], "cpu", None, {}, Level.OK, "none listed"),
        (H100, "cuda", "13.0", {}, Level.OK, "2 x NVIDIA H100 80GB HBM3, driver 570.86; torch is built for CUDA 13.0"),
        (H100, "cpu", None, {}, Level.PROBLEM, "torch 2.13.0+cpu is built without CUDA"),
        (H100, "cpu", "13.0", {}, Level.PROBLEM, "torch for CUDA 13.0 finds none"),
        (H100, "cpu", "13.0", {"CUDA_VISIBLE_DEVICES": ""}, Level.PROBLEM, "(CUDA_VISIBLE_DEVICES=)"),
        (H100, "cpu", "13.0", {"DS_ACCELERATOR": "cpu"}, Level.NOTE, "DS_ACCELERATOR=cpu leaves alone"),
    ],
)
def test_gpus_that_the_driver_lists(
    gpus: list[str], kind: str, cuda: str | None, environ: dict[str, str], level: Level, words: str
) -> None:
    found = only([*compare_with_driver(gpus, kind, cuda, "2.13.0+cpu", environ)])
    assert (found.level, words in found.value) == (level, True), found
    assert bool(found.fix) == (level != Level.OK)


def test_packages_that_are_missing_or_of_other_versions() -> None:
    wanted = ["numpy>=2", "torch<1,>=0.5", "no-such-package>=3", "numpy<1; python_version < '3'"]
    fine, old, missing = packages.compare_versions([Requirement(text) for text in wanted])
    assert (fine.name, fine.level) == ("numpy", Level.OK)
    assert (
        old.level == Level.PROBLEM and "is not in the range" in old.value and old.fix.startswith("pip install 'torch")
    )
    assert (missing.value, missing.fix) == ("not installed", "pip install 'no-such-package>=3'")


def test_an_extra_names_what_it_would_install() -> None:
    wanted = ["numpy>=2; extra == 'a'", "no-such-one; extra == 'b'", "no-such-two; extra == 'b'", "torch"]
    here, absent = packages.find_extras([Requirement(text) for text in wanted], ["a", "b", "all"])
    assert here.name == "optional" and here.value.startswith("numpy 2.")
    assert absent.value.startswith("no-such-one, no-such-two (extra b); pip install")


def test_limits_of_open_files() -> None:
    no_limit = resource.RLIM_INFINITY
    assert machine.compare_open_files(no_limit, no_limit).level == Level.OK
    assert machine.compare_open_files(4096, 4096).level == Level.OK
    for soft, hard, fix in (
        (1024, no_limit, "ulimit -n 65536"),
        (1024, 8192, "ulimit -n 8192"),
        (256, 512, "limits.conf"),
    ):
        found = machine.compare_open_files(soft, hard)
        assert found.level == Level.NOTE and fix in found.fix, (soft, hard)


def test_clock_memory_and_cores_of_containers(tmp_path: Path) -> None:
    assert machine.compare_clock(0).level == Level.OK and machine.compare_clock(None).level == Level.OK
    assert machine.compare_clock(5).level == Level.NOTE
    limit = tmp_path / "memory.max"
    assert "killed" not in machine.find_memory(limit).value
    limit.write_text("max\n")
    assert "killed" not in machine.find_memory(limit).value
    limit.write_text(f"{2**30}\n")
    assert "killed above 1.0 GiB" in machine.find_memory(limit).value
    share = tmp_path / "cpu.max"
    assert machine.cpu_share(share) is None
    for text, expected in (("max 100000\n", None), ("150000 100000\n", 1.5)):
        share.write_text(text)
        assert machine.cpu_share(share) == expected


def test_disk_and_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.find_disk(tmp_path, 2**20)
    assert "MB/s" in found.value and not [*tmp_path.iterdir()]
    assert machine.compare_shared_memory(tmp_path / "none").level == Level.NOTE
    monkeypatch.setattr(machine, "write_speed", lambda folder, num_bytes: 5e6)
    assert machine.find_disk(tmp_path, 2**20).level == Level.NOTE

    def refuse(folder: Path, num_bytes: int) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine, "write_speed", refuse)
    refused = machine.find_disk(tmp_path, 2**20)
    assert refused.level == Level.PROBLEM and "permission denied" in refused.value
    assert machine.find_disk(tmp_path, 2**60).level == Level.PROBLEM


def test_rdma_devices(tmp_path: Path) -> None:
    assert only([*network.find_rdma(tmp_path / "none", {})]).value.startswith("no devices")
    for name, state in (("mlx5_0", "4: ACTIVE\n"), ("mlx5_1", "1: DOWN\n")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
    found = [*network.find_rdma(tmp_path, {})]
    assert (found[0].value, found[0].level) == ("mlx5_0 ACTIVE, mlx5_1 DOWN", Level.OK)
    assert next(network.find_rdma(tmp_path, {"NCCL_IB_DISABLE": "1"})).fix == "unset NCCL_IB_DISABLE"
    (tmp_path / "mlx5_0" / "ports" / "1" / "state").write_text("1: DOWN\n")
    assert next(network.find_rdma(tmp_path, {})).level == Level.NOTE


@pytest.mark.parametrize(
    ("environ", "missing"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth0"}, None),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "eth"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, None),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "eth"),
        ({"NCCL_SOCKET_IFNAME": "^docker0,lo"}, None),
        ({"NCCL_SOCKET_IFNAME": "ib0,eth0"}, "ib0"),
    ],
)
def test_interfaces_that_variables_name(environ: dict[str, str], missing: str | None) -> None:
    found = [*network.compare_interface_names(environ, ["lo", "eth0"])]
    assert [one.level for one in found] == ([] if missing is None else [Level.PROBLEM])
    assert missing is None or f"no interface {missing} that is up" in found[0].value


def test_variables_of_a_launcher() -> None:
    assert network.find_launcher({}).level == Level.OK
    found = network.find_launcher({"RANK": "0"})
    assert found.level == Level.PROBLEM and "RANK=0 but not WORLD_SIZE" in found.value
    assert found.fix == "torchrun, or to start alone: unset RANK"


def test_names_without_an_address_or_with_that_of_this_host_alone() -> None:
    assert network.compare_host_name("localhost").level == Level.NOTE
    assert "has no address" in network.compare_host_name("no-such-host.invalid").value
