"""Planned memory against live storages on ranks that train; rules of the plan that need no ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_ds.planner.memory.ledger import Ledger
from megatron_ds.planner.memory.stage import plan_memory
from megatron_ds.planner.memory.stage_run import pipelined_stage
from megatron_ds.planner.plan_input import Machines
from megatron_ds.planner.trace import trace_layers
from tests.planner.memory_cases import MORE, SAMPLE, MemoryCase
from tests.planner.memory_runs import compare

MOST_OVER, MOST_UNDER = 0.05, 0.02


@pytest.mark.parametrize("case", [*SAMPLE, *(pytest.param(one, marks=pytest.mark.sweep) for one in MORE)], ids=str)
def test_a_plan_is_what_ranks_need(case: MemoryCase) -> None:
    for one in compare(case):
        message = f"stage {one.planned.stage}: {one.error:+.2%} at {one.planned.when}; {dict(one.planned.parts)}"
        assert -MOST_UNDER <= one.error <= MOST_OVER, message


def test_every_kind_of_run_is_measured() -> None:
    cases = [*SAMPLE, *MORE]
    assert len(cases) >= 40 and len({one.name for one in cases}) == len(cases)
    for attribute in ("tensor", "pipeline", "data", "context", "expert"):
        assert {getattr(one, attribute) for one in cases} >= {2}, attribute
    assert {one.zero for one in cases} == {0, 1, 2, 3}


def test_a_ledger_remembers_its_peak() -> None:
    ledger = Ledger()
    ledger.add("weights", 10)
    ledger.moment = "the middle"
    with ledger.holding("gradients", 5):
        ledger.release("weights", 2)
        ledger.add("weights", 1)
    ledger.moment = "the end"
    ledger.add("weights", 2)
    assert (ledger.peak_bytes, ledger.peak_moment) == (15, "the middle")
    assert ledger.peak_parts == {"weights": 10, "gradients": 5} and ledger.total_bytes == 11


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 6])
def test_passes_are_in_the_order_of_deepspeeds_schedule(stages: int, micro_batches: int) -> None:
    from deepspeed.runtime.pipe import schedule

    kinds = {schedule.SendGrad: "sent", schedule.ForwardPass: "forward", schedule.BackwardPass: "backward"}
    for stage in range(stages):
        steps = schedule.TrainSchedule(micro_batches, stages, stage)
        theirs = [kinds[type(one)] for step in steps for one in step if type(one) in kinds]
        assert [kind for kind, _ in pipelined_stage(stage, stages, micro_batches)] == theirs


def _on_gpus(case: MemoryCase, **settings: Any) -> Any:
    case = replace(case, settings={**case.settings, **settings})
    given = replace(case.plan_input(), machines=Machines(1, case.world_size, "cuda"))
    return plan_memory(given, trace_layers(given.layers, given.trace_setting()), 0)


def test_a_gpu_has_allowances_and_a_host_what_is_offloaded() -> None:
    plain = MemoryCase("plain", data=2, zero=2, precision="bf16", settings={"recompute": "full"})
    offloaded = replace(plain, section={"offload_optimizer": {"device": "cpu"}})
    first, second = _on_gpus(plain), _on_gpus(offloaded, offload_activations=True)
    assert min(first.parts[part] for part in ("context", "communication", "fragmentation")) > 0
    assert not first.host_parts and "masters" not in second.parts
    assert second.host_parts["masters"] == first.parts["masters"] and second.host_parts["activations"] > 0
