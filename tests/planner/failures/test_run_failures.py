"""The cost of a planned run's checkpoints, and the plan of its failures."""

from types import SimpleNamespace

import pytest

from megatron_ds.config import OptimizerSection
from megatron_ds.planner.failures.closed_forms import Faults, Saving
from megatron_ds.planner.failures.run_failures import plan_run_failures, saving_of
from megatron_ds.planner.plan_input import Machines


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
    found = saving_of(run(), 405 * 10**9)
    assert found.write_s == pytest.approx(12 * 405e9 / 2e12) and found.pause_s == 1.0
    assert saving_of(run(optimizer="lion"), 405 * 10**9).write_s == pytest.approx(8 * 405e9 / 2e12)
    at_once = saving_of(run(asynchronous=False), 405 * 10**9)
    assert at_once == Saving(found.pause_s + found.write_s)


def test_failures_of_a_run() -> None:
    """The run's own interval is planned, of steps without the share of a pause that `plan_time` gives each of them."""
    step = SimpleNamespace(total_s=12.0, pause_s=2.0)
    found = plan_run_failures(run(every=100), step, 405 * 10**9, Faults(2048))
    assert found.step_s == 10.0 and found.interval_steps == 100 and found.chosen.interval_s == 1000.0
    chosen = plan_run_failures(run(), step, 405 * 10**9, Faults(2048), Saving(30.0))
    assert chosen.saving == Saving(30.0) and chosen.interval_steps == chosen.advised_steps > 1
