"""The plan of a run's failures as data and as text."""

import json
import math

import pytest

from megatron_ds.planner.failures.closed_forms import Faults, Saving, best_interval_s, expected_goodput
from megatron_ds.planner.failures.fault_plan import (
    FaultPlan,
    describe_time,
    estimate_saving,
    fault_facts,
    fault_lines,
    longest_interval_s,
    plan_faults,
)


def plan(**changes) -> FaultPlan:
    return plan_faults(Faults(2048), Saving(10.0, 60.0), step_s=20.0, **changes)


def test_the_advised_interval_is_nearly_the_best() -> None:
    found = plan()
    assert found.interval_steps == found.advised_steps and found.chosen == found.advised
    best = best_interval_s(10.0, found.faults.mtbf_s)
    assert best < found.advised.interval_s < 2 * best
    highest = expected_goodput(best, found.saving, found.faults)
    at_advised = expected_goodput(longest_interval_s(found.saving, found.faults), found.saving, found.faults)
    assert highest - at_advised == pytest.approx(0.001, rel=0.01)
    assert found.advised.share == pytest.approx(highest - 0.001, abs=3.5 * found.advised.error)
    assert all(one.share < found.advised.share for one in found.others)
    assert found.slowdown == pytest.approx(1 / found.advised.share)


def test_the_interval_of_a_run_file() -> None:
    found = plan(interval_steps=1000)
    assert found.interval_steps == 1000 and found.chosen.interval_s == 20_000
    assert found.chosen.share < 0.5 < 0.9 < found.advised.share


def test_slow_writes_are_waited_for() -> None:
    found = plan_faults(Faults(2048), Saving(1.0, 900.0), step_s=20.0)
    assert found.advised_steps >= 45
    often = plan_faults(Faults(2048), Saving(1.0, 900.0), step_s=20.0, interval_steps=10)
    assert often.chosen.shares["saving"] / often.chosen.share > 700 / 200
    assert dict(fault_lines(often))["saves"].endswith(" %; training waits until the last one is written")


def test_runs_that_never_get_far() -> None:
    """Restarts that take longer than a cluster stays up."""
    found = plan_faults(Faults(2048, node_mtbf_hours=20.0), Saving(10.0, 60.0), step_s=20.0)
    assert found.chosen.share < 1e-4 and found.slowdown > 1e4
    assert dict(fault_lines(found))["failures"].startswith("one every 35.2 s on 2,048 nodes")
    assert json.dumps(fault_facts(found), allow_nan=False)
    assert dict(fault_lines(plan_faults(Faults(1), Saving(1.0), 1.0)))["failures"].startswith(
        "one every 264 days on 1 node, 0 in 30 days"
    )


def test_runs_without_any_progress() -> None:
    """No restart is ever completed: infinite times are None, and no line shows them."""
    found = plan_faults(Faults(2048, node_mtbf_hours=0.01), Saving(10.0, 60.0), step_s=20.0)
    assert found.chosen.share == 0 and found.slowdown == math.inf == found.faults.down_s
    assert json.dumps(fault_facts(found), allow_nan=False)
    lines = dict(fault_lines(found))
    assert lines["failures"].endswith("; no restart is completed")
    assert not [line for line in lines.values() if "inf" in line or "nan" in line]


def test_facts_are_json() -> None:
    facts = json.loads(json.dumps(fault_facts(plan(interval_steps=1000)), allow_nan=False))
    assert facts["rates"]["nodes"] == 2048 and facts["rates"]["job_mtbf_hours"] is None
    assert facts["mtbf_s"] == pytest.approx(11_135, rel=1e-3) and facts["young_s"] > facts["daly_s"]
    assert facts["chosen"]["interval_steps"] == 1000
    assert facts["chosen"]["goodput"] < facts["advised"]["goodput"]
    assert sum(facts["advised"]["shares"].values()) == pytest.approx(1.0)
    assert [one["interval_s"] for one in facts["others"]] == sorted(one["interval_s"] for one in facts["others"])


def test_lines() -> None:
    lines = dict(fault_lines(plan(interval_steps=1000)))
    assert list(lines) == ["failures", "a save", "saves", "better", "lost to", "spare nodes"]
    assert lines["failures"].startswith("one every 3.09 h on 2,048 nodes, ")
    assert lines["a save"] == "pauses training for 10 s, written 1 min later"
    assert lines["saves"].startswith("every 1,000 steps (5.56 h): goodput ")
    assert lines["lost to"].startswith("repeated training ")
    assert lines["spare nodes"].startswith("as many as needed; 12 are enough for 999 of 1,000 failures")
    assert not {"better", "enough"} & dict(fault_lines(plan())).keys()
    often = dict(fault_lines(plan_faults(Faults(8), Saving(1.0), step_s=20.0, interval_steps=50)))
    assert "better" not in often and often["enough"].startswith("every ")


def test_estimates_of_saves() -> None:
    """BLOOM's 2.3 TB on 48 nodes take 40 s; many nodes share 2 TB/s."""
    bloom = estimate_saving(2.3e12 / 384, 2.3e12, 48, asynchronous=False, copy_gb_s=20)
    assert bloom.pause_s == pytest.approx(41, abs=0.5) and bloom.write_s == 0
    llama = estimate_saving(40e9, 5e12, 2048, asynchronous=True, copy_gb_s=20)
    assert (llama.pause_s, llama.write_s) == pytest.approx((2.0, 2.5))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (59, "59 s"), (90, "1.5 min"), (3 * 3600, "3 h"), (60 * 3600, "2.5 days")]
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert describe_time(seconds) == text
