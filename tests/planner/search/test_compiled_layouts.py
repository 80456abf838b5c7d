"""`train.compile` is chosen where it is planned to be faster, and a search that begins with it finds the same."""

from typing import Any

from megatron_ds.config import build_run
from megatron_ds.planner.plan import make_plan
from megatron_ds.planner.search.branch_and_bound import Limits
from megatron_ds.planner.search.find_layouts import LEAST_GAIN, find_layouts
from megatron_ds.training.planning import plan_input
from tests.planner.search.test_published_searches import searched

VARIES = frozenset({"micro_batch_size"})
MODEL = {
    "model_type": "gpt2",
    "vocab_size": 2048,
    "n_embd": 512,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": 1024,
}


def found(compiled: bool) -> list[Any]:
    run = build_run(
        {
            "model": {"config": MODEL},
            "deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
            "data": {"format": "indexed", "train": ["tokens"], "seq_length": 1024},
            "train": {"steps": 1, "global_batch_size": 8, "compile": compiled},
            "output": "out",
        }
    )
    given = searched(run, 1, 1, "h100", None)
    limits = Limits(given.device.memory_bytes)
    plain = find_layouts(given.without_compilation(), limits, VARIES, offload=False).found
    layouts = find_layouts(given, limits, VARIES, offload=False, compiles=True).found
    assert not any(one.candidate.compile for one in plain)
    for one in layouts:
        plan = make_plan(plan_input(one.run, given.machines), given.device, given.network, given.device.memory_bytes)
        assert one.run.train.compile == one.candidate.compile
        assert abs(plan.time.total_s / one.estimate.step_s - 1) < 1e-9
    assert layouts[0].candidate.compile
    assert layouts[0].estimate.step_s < (1 - LEAST_GAIN) * plain[0].estimate.step_s
    return [one.candidate for one in layouts]


def test_a_search_compiles_what_that_makes_faster() -> None:
    assert found(compiled=False) == found(compiled=True)
