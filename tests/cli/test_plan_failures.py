"""Options of `megatron-ds plan` about failures."""

from pathlib import Path

import pytest

from megatron_ds.cli.plan_failures import draw_failures, faults_of, parse_saving, parse_stragglers
from megatron_ds.errors import ConfigError
from megatron_ds.planner.failures.closed_forms import Saving
from megatron_ds.planner.failures.fault_plan import plan_faults
from megatron_ds.planner.pipeline.stragglers import RandomSlowness


def test_rates() -> None:
    assert faults_of(2048, None, 300.0, None).mtbf_s == pytest.approx(3.093 * 3600, rel=1e-3)
    found = faults_of(16, 1600.0, 60.0, 2)
    assert found.mtbf_s == pytest.approx(100 * 3600) and (found.restart_s, found.spare_nodes) == (60.0, 2)


def test_costs_of_saves() -> None:
    assert parse_saving("1.5") == Saving(1.5) and parse_saving("1.5,40") == Saving(1.5, 40.0)


@pytest.mark.parametrize("text", ["", "a", "1,2,3", "-1", "nan", "1,inf", "1;2"])
def test_wrong_costs_of_saves(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--save-seconds=.* is not the seconds of a pause, .*; try 2 or 2,60"):
        parse_saving(text)


def test_stragglers() -> None:
    found = parse_stragglers("1,5")
    assert (found.device_variance, found.pass_variance) == pytest.approx((0.0001, 0.0025))
    assert parse_stragglers("2") == RandomSlowness(0.02**2)
    for text in ("", "a", "1,2,3", "-1", "101"):
        with pytest.raises(ConfigError, match=r"--stragglers=.* is not the percent of devices, .*; try 1 or 1,5"):
            parse_stragglers(text)


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_wrong_rates(hours: float) -> None:
    with pytest.raises(ConfigError, match=r"--mtbf-hours=.* must be above 0; try 6335"):
        faults_of(2, hours, 300.0, None)


def test_picture(tmp_path: Path) -> None:
    plan = plan_faults(faults_of(16, None, 300.0, None), Saving(1.0), 2.0)
    draw_failures(plan, 8, tmp_path / "goodput.png")
    assert (tmp_path / "goodput.png").stat().st_size > 10_000
