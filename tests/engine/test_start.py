"""What starting costs: nothing is imported that a run does not use."""

import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ds.engine import distributed
from megatron_ds.errors import TopologyError
from megatron_ds.parallel.rank_info import RankInfo
from tests.listening import listening_addresses
from tests.ranks import run_local_ranks, run_ranks

CODE = """
import sys, torch
compile_ = torch.compile
from megatron_ds.engine import preload
for compiles in (False, True):
    preload(compiles)
    assert torch.compile is compile_
    print("torch._inductor.compile_fx" in sys.modules, "deepspeed.runtime.zero.stage3" in sys.modules)
"""


def test_the_compiler_is_imported_by_runs_that_compile() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split()[-4:] == ["False", "True", "True", "True"]


def test_devices_are_those_of_the_local_ranks() -> None:
    for rank in range(4):
        assert distributed._device_index(RankInfo(4 + rank, 8, rank), 4, is_launched=True) == rank
        assert distributed._device_index(RankInfo(4 + rank, 8, rank), 1, is_launched=True) == 0, "it sees its own alone"
        assert distributed._device_index(RankInfo(rank, 4, rank), 2, is_launched=False) == rank % 2, (
            "tests share devices"
        )


def test_a_local_rank_without_a_device_is_refused() -> None:
    with pytest.raises(TopologyError) as refused:
        distributed._device_index(RankInfo(6, 8, 2), 2, is_launched=True)
    assert str(refused.value) == (
        "LOCAL_RANK=2 of rank 6 has no device: it sees 2, numbered from 0; nearest: 2 ranks on each machine"
    )


def test_the_process_group_is_given_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda **arguments: given.update(arguments))
    monkeypatch.setenv(distributed.RENDEZVOUS_FILE, "/nowhere")
    device = torch.device("cuda", 1)
    distributed._connect("nccl", RankInfo(1, 2, 1), timedelta(seconds=5), None, device)
    assert given["device_id"] == device and given["backend"] == "nccl" and given["world_size"] == 2


def test_ranks_of_one_machine_open_no_port_to_others() -> None:
    def addresses(info: RankInfo) -> set[str]:
        dist.new_group(backend="gloo")
        return listening_addresses()

    assert run_ranks(addresses, 2) == [{"127.0.0.1"}] * 2


def test_groups_made_later_have_the_time_limit_of_the_first() -> None:
    """torch's own limit, 10 minutes with NCCL, would end a run before its watchdog names who is waited for."""

    def limits(info: RankInfo) -> list[float]:
        distributed.start_distributed(info, timeout_s=77.0)
        groups = [dist.group.WORLD, dist.new_group(), dist.new_group([0], backend="gloo")]
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

    assert run_local_ranks(limits, 1) == [[77.0, 77.0, 77.0]]
