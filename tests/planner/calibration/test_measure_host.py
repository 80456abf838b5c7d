"""Times of the host: the remainder of steps of small models, and a plan that has them again."""

from functools import partial

import pytest
import torch

from megatron_ds.engine import start_distributed, stop_distributed
from megatron_ds.parallel.launch import RankInfo
from megatron_ds.planner.calibration import measure_host
from megatron_ds.planner.calibration.measure_host import FEW, MANY, STAGES, measure_blocks, with_host_times
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.timing.step_time import plan_time
from tests.ranks import preload, run_alone, run_local_ranks

CPU = find_device("cpu").model_copy(update={"host_us": 0.0, "hook_us": 0.0})


def planned_blocks(device: Device, ranks: int) -> dict[int, float]:
    """Planned seconds of the blocks by ZeRO stage."""
    network, found = find_network(None, device, ranks), {}
    for stage in STAGES:
        few_s, many_s = (
            plan_time(measure_host._input(stage, blocks, ranks), device, network).total_s for blocks in (FEW, MANY)
        )
        found[stage] = many_s - few_s
    return found


def found_again(ranks: int) -> tuple[Device, dict[int, float]]:
    slow = CPU.model_copy(update={"name": "slow", "host_us": 30.0, "hook_us": 400.0})
    measured = planned_blocks(slow, ranks)
    return with_host_times(CPU, measured, ranks), planned_blocks(CPU, ranks)


def test_times_of_the_host_are_what_plans_lack() -> None:
    device, without = run_alone(partial(found_again, 2))
    assert device.host_us == pytest.approx(30.0, rel=0.01) and device.hook_us == pytest.approx(400.0, rel=0.01)
    assert 0 < without[0] < 10e-3, "hardly anything is computed"


def test_a_machine_faster_than_its_plan_has_no_time_of_the_host() -> None:
    device = run_alone(partial(with_host_times, CPU, dict.fromkeys(STAGES, 0.0), 1))
    assert device.host_us == device.hook_us == 0.0


def measured_blocks(info: RankInfo) -> dict[int, float]:
    torch.set_num_threads(1)
    found = measure_blocks(info, start_distributed(info))
    stop_distributed()
    return found


@pytest.mark.sweep
def test_hooks_of_modules_take_longer_than_operations() -> None:
    preload()
    (found,) = run_local_ranks(measured_blocks, 1)
    device = run_alone(partial(with_host_times, CPU, found, 1))
    assert 2 < device.host_us < 500 and 20 * device.host_us > device.hook_us > 2 * device.host_us
