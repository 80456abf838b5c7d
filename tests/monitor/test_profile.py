"""Traces summed up by part: what adds up to a step, what communication hides behind, on a CPU and on a GPU."""

from typing import Any

import pytest

from megatron_ds.monitor.profile import EXPOSED, OTHER, PartTimes, table, time_by_part
from megatron_ds.parallel.regions import (
    ATTENTION,
    BLOCK,
    DATA,
    EXPERTS,
    HEAD,
    MLP,
    NEIGHBOURS,
    OPTIMIZER,
    PREFIX,
    ROUTER,
    STEP,
)

BACKWARD = "autograd::engine::evaluate_function: "


def event(name: str, begin: float, end: float, *, tid: Any = 1, cat: str = "cpu_op", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": begin, "dur": end - begin, "args": args}


def annotation(name: str, begin: float, end: float, *, tid: Any = 1) -> dict[str, Any]:
    return event(name, begin, end, tid=tid, cat="user_annotation")


def link(number: int, forward: float, backward: float, backward_tid: Any = 1) -> list[dict[str, Any]]:
    return [
        {"ph": "s", "cat": "fwdbwd", "id": number, "tid": 1, "ts": forward},
        {"ph": "f", "cat": "fwdbwd", "id": number, "tid": backward_tid, "ts": backward},
    ]


def summed(events: list[dict[str, Any]]) -> tuple[dict[str, float], float]:
    """In microseconds, what is not 0."""
    times = time_by_part({"traceEvents": events})
    return {name: round(s * 1e6, 6) for name, s in times.seconds.items() if s}, round(times.hidden_s * 1e6, 6)


def step_on_a_cpu() -> list[dict[str, Any]]:
    return [
        annotation(STEP, 0, 1000),
        annotation(PREFIX + DATA, 0, 50),
        annotation(PREFIX + BLOCK, 100, 400),
        event("aten::rms_norm", 100, 120),
        annotation(PREFIX + ATTENTION, 120, 300),
        event("aten::linear", 120, 220),
        event("aten::mm", 121, 219),
        event("_RowLinear", 220, 300),
        event("aten::mm", 220, 240),  # then it waits
        annotation(PREFIX + MLP, 300, 400),
        event("aten::mm", 300, 400),
        event(BACKWARD + "MmBackward0", 500, 600),
        event("aten::mm", 510, 590),
        event(BACKWARD + "RmsNormBackward0", 600, 640),
        event(BACKWARD + "Unknown", 640, 650),
        annotation("Optimizer.step#AdamW.step", 800, 900),
        event("aten::_fused_adamw_", 810, 890),
        *link(1, 121, 500),
        *link(2, 100, 600),
        annotation("gloo:all_reduce", 240, 310, tid=2),  # 10 of it beside the MLP
        annotation("gloo:all_reduce", 560, 580, tid=3),  # all of it beside a product
        event("aten::copy_", 0, 900, tid=4),  # a thread that reads data
    ]


def test_a_step_on_a_cpu() -> None:
    parts, hidden = summed(step_on_a_cpu())
    assert parts == {
        DATA: 50,
        ATTENTION: 180 - 60 + 100,
        MLP: 100,
        BLOCK: 20 + 40,
        OPTIMIZER: 100,
        EXPOSED: 60,
        OTHER: 1000 - 50 - 220 - 100 - 60 - 100 - 60,
    }
    assert hidden == 10 + 20


def test_parts_are_means_of_the_recorded_steps() -> None:
    again = [{**one, "ts": one["ts"] + 5000} for one in step_on_a_cpu()]
    for one in again:
        if one["ph"] != "X":
            one["id"] += 10
    once, twice = (time_by_part({"traceEvents": events}) for events in (step_on_a_cpu(), step_on_a_cpu() + again))
    assert twice.steps == 2 and twice.seconds == pytest.approx(once.seconds)
    assert twice.step_s == pytest.approx(1000e-6)


def test_what_is_recomputed_belongs_to_its_part() -> None:
    """A forward operation inside the backward pass of something else."""
    parts, _ = summed(
        [
            annotation(STEP, 0, 100),
            event(BACKWARD + "CheckpointBackward", 0, 100),
            annotation(PREFIX + MLP, 10, 60),
            event("aten::mm", 10, 50),
        ]
    )
    assert parts == {MLP: 50, OTHER: 50}


def test_an_operation_belongs_to_the_innermost_part() -> None:
    """Parts of a mixture of experts are inside the MLP's, and each operation counts once, backward too."""
    parts, _ = summed(
        [
            annotation(STEP, 0, 100),
            annotation(PREFIX + MLP, 0, 50),
            annotation(PREFIX + ROUTER, 0, 10),
            event("aten::topk", 0, 10),
            annotation(PREFIX + EXPERTS, 10, 40),
            event("_GroupedLinear", 10, 40),
            event("aten::mm", 15, 40),
            event("aten::add", 40, 50),
            event(BACKWARD + "_GroupedLinearBackward", 60, 90),
            event("aten::mm", 60, 85),
            *link(1, 10, 60),
        ]
    )
    assert parts == {MLP: 10, ROUTER: 10, EXPERTS: 30 + 30, OTHER: 20}


def test_sums_through_shared_memory_are_communication() -> None:
    """Although the thread that computes makes them itself."""
    parts, hidden = summed(
        [
            annotation(STEP, 0, 100),
            annotation(PREFIX + MLP, 10, 60),
            event("aten::mm", 10, 40),
            event("deepspeed::inference_all_reduce_", 40, 60),
        ]
    )
    assert parts == {MLP: 30, EXPOSED: 20, OTHER: 50} and hidden == 0


def test_exchanges_through_memory_are_communication_with_their_copies() -> None:
    parts, hidden = summed(
        [
            annotation(STEP, 0, 100),
            annotation(PREFIX + MLP, 10, 60),
            event("aten::mm", 10, 40),
            annotation(NEIGHBOURS, 40, 60),
            event("aten::copy_", 42, 48),
        ]
    )
    assert parts == {MLP: 30, EXPOSED: 20, OTHER: 50} and hidden == 0


def test_a_step_on_a_gpu() -> None:
    """The device's time counts: kernels by what started them, from the backward pass's own thread too."""
    kernels = [
        event("gemm", 100, 300, tid=7, cat="kernel", **{"External id": 11}),
        event("gemm", 300, 500, tid=7, cat="kernel", **{"External id": 12}),
        event("ncclDevKernel_AllReduce", 400, 650, tid=8, cat="kernel", **{"External id": 13}),
        event("softmax", 700, 800, tid=7, cat="kernel", **{"External id": 14}),
        event("stray", 800, 810, tid=7, cat="kernel"),
    ]
    parts, hidden = summed(
        [
            annotation(STEP, 0, 1000),
            annotation(PREFIX + DATA, 0, 90),
            annotation(PREFIX + ATTENTION, 90, 95),
            event("aten::mm", 91, 92, **{"External id": 11}),
            annotation(PREFIX + HEAD, 95, 99),
            event("aten::_softmax", 96, 97, **{"External id": 14}),
            event(BACKWARD + "MmBackward0", 110, 115, tid=2),
            event("aten::mm", 111, 112, tid=2, **{"External id": 12}),
            event("c10d::allreduce_", 113, 114, tid=2, **{"External id": 13}),
            *link(1, 91, 110, backward_tid=2),
            *kernels,
        ]
    )
    assert parts == {DATA: 90, ATTENTION: 400, HEAD: 100, EXPOSED: 150, OTHER: 1000 - 90 - 400 - 100 - 150}
    assert hidden == 100


def test_the_table() -> None:
    fast = PartTimes({ATTENTION: 1.0, EXPOSED: 0.5, OTHER: 0.5}, 0.25, 3)
    slow = PartTimes({ATTENTION: 1.5, EXPOSED: 0.0, OTHER: 0.5}, 0.0, 3)
    every = [PartTimes({**dict.fromkeys(PARTS_OF_A_STEP, 0.0), **one.seconds}, one.hidden_s, 3) for one in (fast, slow)]
    lines = table(every)
    assert lines[1].split() == ["attention", "1.2500", "62.5%", "1.5000", "1"]
    assert lines[-2].split() == ["step", "2.0000", "100.0%", "2.0000", "0"]
    assert lines[-1].split() == ["(communication,", "hidden)", "0.1250", "6.2%", "0.2500", "0"]
    assert len({len(line) for line in lines[1:]}) == 1, "columns stand under one another"
    assert not any(line.startswith("experts") for line in lines)
    with_experts = [PartTimes({**one.seconds, EXPERTS: 0.5}, one.hidden_s, 3) for one in every]
    assert any(line.startswith("experts") for line in table(with_experts))


PARTS_OF_A_STEP = time_by_part({"traceEvents": []}).seconds
