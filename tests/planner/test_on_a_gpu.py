"""Plans against steps on an H200, as bench/results-gpu.json has them: memory by torch's allocator, and time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_alone

RESULTS = Path(__file__).parents[2] / "bench" / "results-gpu.json"
MOST_OVER, MOST_UNDER = 0.05, 0.02
LARGEST_TIME_ERROR = 0.06
HOST_BOUND = ("ZeRO-3",)
"""Cases in which DeepSpeed's hooks of modules keep the host busy for longer than the device."""


@cache
def measured() -> dict[str, dict[str, Any]]:
    from bench.gpu.fast.targets import PLANNED

    rows = json.loads(RESULTS.read_text())["fast"]
    device = next(row for row in rows if row["section"] == "environment")["device"]
    assert device == "NVIDIA H200", "another device's results need its profile here"
    return {row["name"]: row for row in rows if row["section"] == PLANNED}


def _plans(names: list[str]) -> Iterator[tuple[int, float]]:
    from bench.gpu.fast.plans import CASES, tensors_bytes
    from megatron_ds.planner.plan import make_plan
    from megatron_ds.planner.profiles import find_device, find_network

    device = find_device("h200")
    for name in names:
        plan = make_plan(CASES[name].plan_input("cuda"), device, find_network(None, device, 1))
        yield tensors_bytes(plan.fullest), plan.time.total_s


def _planned(names: list[str]) -> list[tuple[int, float]]:
    return list(_plans(names))


@pytest.fixture(scope="module")
def planned() -> dict[str, tuple[int, float]]:
    names = list(measured())
    return dict(zip(names, run_alone(_planned, names)))


def test_memory_is_what_the_allocator_gave_out(planned: dict[str, tuple[int, float]]) -> None:
    known = {name: row["measured_gb"] * 1e9 for name, row in measured().items() if "measured_gb" in row}
    assert len(known) >= 4
    for name, allocated in known.items():
        assert -MOST_UNDER <= planned[name][0] / allocated - 1 <= MOST_OVER, name


def test_steps_take_the_planned_time(planned: dict[str, tuple[int, float]]) -> None:
    errors = {name: planned[name][1] * 1e3 / row["measured_ms"] - 1 for name, row in measured().items()}
    assert len(errors) > 4 and all(errors.pop(name) < -LARGEST_TIME_ERROR for name in HOST_BOUND)
    assert all(abs(error) <= LARGEST_TIME_ERROR for error in errors.values()), errors
