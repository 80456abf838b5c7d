"""Random slowness of devices and passes, against the expected values of the distributions."""

import math

import numpy as np
import pytest

from megatron_ds.errors import ConfigError
from megatron_ds.planner.pipeline.stragglers import Jitter
from megatron_ds.planner.pipeline.timetable import StageTimes, simulate, slowdown, step_times

STAGE = StageTimes(1.0, 2.0)


def expected_slowest(variance: float, number: int) -> float:
    """Mean of the largest of log-normal factors with mean 1, by the integral of 1 - F(x)^n over x."""
    of_log = math.log1p(variance)
    points = np.linspace(1e-6, 6.0, 400_001)
    below = [0.5 * math.erfc(-(math.log(x) + of_log / 2) / math.sqrt(2 * of_log)) for x in points[::40]]
    return float(np.trapezoid(1 - np.array(below) ** number, points[::40])) + 1e-6


@pytest.mark.parametrize(("devices", "replicas"), [(1, 1), (8, 1), (1, 64), (8, 16)])
def test_slow_devices(devices: int, replicas: int) -> None:
    """Without a pipeline, a run's steps are all as long as its slowest device needs."""
    variance, num_micro_batches = 0.01, 4
    runs = []
    for seed in range(200):
        jitter = Jitter(device_variance=variance, devices=devices, replicas=replicas, seed=seed)
        steps = step_times(simulate([STAGE], num_micro_batches), jitter, 2)
        assert steps[0] == steps[1]
        runs.append(steps[0] / (3.0 * num_micro_batches))
    error = np.std(runs) / math.sqrt(len(runs))
    assert abs(np.mean(runs) - expected_slowest(variance, devices * replicas)) < 3.5 * error


def test_slow_passes() -> None:
    """One pass has the variance that was asked for, and a step of many passes the variance of their mean."""
    jitter = Jitter(pass_variance=0.04, seed=3)
    steps = step_times(simulate([STAGE], 16), jitter, 600)
    assert steps.mean() == pytest.approx(48.0, abs=3.5 * steps.std() / math.sqrt(600))
    assert steps.var() == pytest.approx(0.04 * 16 * (1.0**2 + 2.0**2), rel=0.2)  # 3.5 standard errors
    slowest = Jitter(pass_variance=0.04, devices=8, seed=3)
    of_devices = step_times(simulate([STAGE], 16), slowest, 100)
    assert of_devices.mean() / 48.0 == pytest.approx(expected_slowest(0.04, 8), rel=0.01)


def test_a_pipeline_waits_for_random_passes() -> None:
    """More variance makes steps longer than the even pipeline, and no step is shorter than its busiest rank needs."""
    stages, even_s = [STAGE] * 8, (32 + 7) * 3.0
    means = []
    for variance in (0.0, 0.01, 0.09):
        steps = step_times(simulate(stages, 32), Jitter(pass_variance=variance, replicas=4), 30)
        means.append(steps.mean())
    assert means[0] == pytest.approx(even_s)
    assert means[0] < means[1] < means[2]
    factor = slowdown(simulate(stages, 32), Jitter(pass_variance=0.09, replicas=4), 30)
    assert factor == pytest.approx(means[2] / even_s)
    one = simulate(stages, 32, "deepspeed", jitter=Jitter(pass_variance=0.09, seed=1))
    assert one.duration_s >= max(one.busy_s)


def test_a_seed_repeats_itself() -> None:
    def steps(seed: int) -> list[float]:
        jitter = Jitter(device_variance=0.001, pass_variance=0.01, devices=2, replicas=3, seed=seed)
        return step_times(simulate([STAGE] * 4, 8, "1f1b"), jitter, 3).tolist()

    assert steps(5) == steps(5) != steps(6)
    one, other = (simulate([STAGE] * 4, 8, jitter=Jitter(pass_variance=0.01, seed=5)).duration_s for _ in range(2))
    assert one == other


def test_many_replicas_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    jitter = Jitter(device_variance=0.01, replicas=7, seed=2)
    whole = step_times(simulate([STAGE] * 2, 4), jitter, 1)
    monkeypatch.setattr("megatron_ds.planner.pipeline.timetable.MOST_NUMBERS", 50)
    assert step_times(simulate([STAGE] * 2, 4), jitter, 1) == pytest.approx(whole)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"jitter: pass_variance=-0.1 must be finite and at least 0; nearest: 0"):
        Jitter(pass_variance=-0.1)
