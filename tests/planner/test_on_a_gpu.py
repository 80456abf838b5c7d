"""Plans against steps on an H200, as bench/results-gpu.json has them: memory by torch's allocator, and time."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_alone

RESULTS = Path(__file__).parents[2] / "bench" / "results-gpu.json"
MOST_OVER, MOST_UNDER = 0.05, 0.02
LARGEST_TIME_ERROR = 0.06
"""Of ZeRO-3 it proves nothing: `hook_us` of the profiles of GPUs is from that step, of which the host is the limit."""
WHOLE = "1.2 B Llama"
"""The case of a whole model, which contestants train too, eager and compiled."""


@cache
def rows(section: str) -> dict[str, dict[str, Any]]:
    """The results of a section by name."""
    found = json.loads(RESULTS.read_text())["fast"]
    device = next(row for row in found if row["section"] == "environment")["device"]
    assert device == "NVIDIA H200", "another device's results need its profile here"
    return {row["name"]: row for row in found if row["section"] == section}


def measured() -> dict[str, dict[str, Any]]:
    from bench.gpu.fast.targets import PLANNED

    return rows(PLANNED)


def _planned(names: list[str], compiled: bool) -> list[tuple[int, float]]:
    """Bytes and seconds of each case."""
    from bench.gpu.fast.plans import CASES, tensors_bytes
    from megatron_ds.planner.plan import make_plan
    from megatron_ds.planner.profiles import find_device, find_network

    device, found = find_device("h200"), []
    for name in names:
        case = replace(CASES[name], fields={**CASES[name].fields, "compile": compiled})
        plan = make_plan(case.plan_input("cuda"), device, find_network(None, device, 1))
        found.append((tensors_bytes(plan.fullest), plan.time.total_s))
    return found


@pytest.fixture(scope="module")
def planned() -> dict[str, tuple[int, float]]:
    names = list(measured())
    return dict(zip(names, run_alone(_planned, names, False)))


def test_memory_is_what_the_allocator_gave_out(planned: dict[str, tuple[int, float]]) -> None:
    known = {name: row["measured_gb"] * 1e9 for name, row in measured().items() if "measured_gb" in row}
    assert len(known) >= 4
    for name, allocated in known.items():
        assert -MOST_UNDER <= planned[name][0] / allocated - 1 <= MOST_OVER, name


def test_steps_take_the_planned_time(planned: dict[str, tuple[int, float]]) -> None:
    errors = {name: planned[name][1] * 1e3 / row["measured_ms"] - 1 for name, row in measured().items()}
    assert len(errors) > 4 and "ZeRO-3" in errors
    assert all(abs(error) < LARGEST_TIME_ERROR for error in errors.values()), errors


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_whole_model_takes_the_planned_time(compiled: bool) -> None:
    """Gradients of compiled products are cast and added to the sums in fp32, which other products do themselves."""
    from bench.gpu.fast.targets import COMPILED, LLAMA, OURS

    row = rows(LLAMA)[COMPILED if compiled else OURS]
    ((tensors, seconds),) = run_alone(_planned, [WHOLE], compiled)
    assert abs(seconds * 1e3 / row["ms"] - 1) <= 0.03
    assert -MOST_UNDER <= tensors / (row["peak_gb"] * 1e9) - 1 <= MOST_OVER
