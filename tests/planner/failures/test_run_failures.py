"""The cost of a planned run's checkpoints, and the plan of its failures."""

from types import SimpleNamespace

import pytest

from megatron_ds.config import OptimizerSection
from megatron_ds.planner.failures.closed_forms import Faults, Saving
from megatron_ds.planner.failures.run_failures import plan_run_failures, saving_of
from megatron_ds.planner.plan_input import Machines
from megatron_ds.planner.profiles import find_device

DEVICE = find_device("h100")


def run(asynchronous: bool = True, every: int = 0, optimizer: str = "adamw") -> SimpleNamespace:
    """The attributes of a `PlanInput` for 405B parameters on 2,048 nodes that these functions read."""
    return SimpleNamespace(
        config=SimpleNamespace(optimizer=OptimizerSection(name=optimizer, lr=1e-4)),
        layout=SimpleNamespace(world_size=16384),
        machines=Machines(2048, 8, "cuda"),
        saves_asynchronously=asynchronous,
        save_every=every,
    )


def test_cost_of_checkpoints() -> None:
    """12 bytes a parameter of AdamW, 8 of Lion: 4.9 TB at 2 TB/s."""
    found = saving_of(run(), 405 * 10**9, DEVICE)
    assert found.write_s == pytest.approx(12 * 405e9 / 2e12) and found.pause_s == 1.0
    assert saving_of(run(optimizer="lion"), 405 * 10**9, DEVICE).write_s == pytest.approx(8 * 405e9 / 2e12)
    at_once = saving_of(run(asynchronous=False), 405 * 10**9, DEVICE)
    assert at_once == Saving(found.pause_s + found.write_s)


def test_a_pause_is_as_long_as_the_device_copies() -> None:
    """At the rate at which a step's time has copies to the host."""
    given, number = run(), 16384 * 10**10  # 120 GB a rank
    assert saving_of(given, number, DEVICE).pause_s == pytest.approx(120 / DEVICE.host_gb_s)
    assert saving_of(given, number, find_device("a100-80")).pause_s == pytest.approx(120 / 20)


def test_failures_of_a_run() -> None:
    """The run's own interval is planned, of steps without the share of a pause that `plan_time` gives each of them."""
    step = SimpleNamespace(total_s=12.0, pause_s=2.0)
    found = plan_run_failures(run(every=100), step, 405 * 10**9, Faults(2048), DEVICE)
    assert found.step_s == 10.0 and found.interval_steps == 100 and found.chosen.interval_s == 1000.0
    chosen = plan_run_failures(run(), step, 405 * 10**9, Faults(2048), DEVICE, Saving(30.0))
    assert chosen.saving == Saving(30.0) and chosen.interval_steps == chosen.advised_steps > 1
