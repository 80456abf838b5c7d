"""Advice is planned: the gain that it names is that of a plan of the changed run, also for keys of ZeRO."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from megatron_ds.config import build_run
from megatron_ds.planner import advice
from megatron_ds.planner.advice import MOST_SHOWN, advise, zero_changes, zero_keys
from megatron_ds.planner.plan_input import Machines
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.search.space import Candidate
from megatron_ds.training.planning import RunPlanner

MODEL = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
}
BLOCK = 4 * 2048 * 2048 + 3 * 2048 * 8192 + 2 * 2048
DEVICE = find_device("h100", measured=False)


def planner(zero: dict[str, Any], nodes: int = 2, **train: Any) -> RunPlanner:
    """A small run in bf16 on machines with slow network cards."""
    run = build_run(
        {
            "model": {"config": MODEL},
            "deepspeed": {"bf16": {"enabled": True}, "zero_optimization": zero},
            "data": {"format": "indexed", "train": ["nowhere/corpus"], "seq_length": 512},
            "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 1, **train},
            "output": "/nowhere/out",
        }
    )
    return RunPlanner(run, Machines(nodes, 8), DEVICE, find_network("ethernet 25Gb/s", DEVICE, 8))


def sent(plan: Any, kind: str) -> float:
    """Bytes that data ranks send in one kind of collective."""
    return float(plan.wire[0].by_axis["shard", kind].num_bytes)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_are_summed_on_one_rank(stage: int) -> None:
    """Half of the bytes of the all-reduces at ZeRO-2; at ZeRO-1 bf16 has flat gradients, which the key leaves alone."""
    at = planner({"stage": stage})
    plan = at.plan()
    changes = [*zero_changes(plan)]
    if stage == 1:
        assert changes == []
        return
    assert changes == [{"use_multi_rank_bucket_allreduce": False}]
    changed = at.replan(at.candidate, changes[0])
    assert changed is not None
    assert sent(changed, "broadcast") == pytest.approx(sent(plan, "all_reduce") / 2)
    assert changed.time.total_s < plan.time.total_s
    found = advise(plan, at.candidate, at.replan)
    advised = {one.changes: one.plan.time.total_s for one in found}
    key = "deepspeed.zero_optimization.use_multi_rank_bucket_allreduce=false"
    assert advised[(key,)] == changed.time.total_s
    assert 1 <= len(found) <= MOST_SHOWN and [*advised.values()] == sorted(advised.values())
    assert not [*zero_changes(changed)], "it is not advised again"


def test_weights_that_are_gathered_a_third_time() -> None:
    """A block that is recomputed and larger than the reuse distance is gathered again for its backward pass."""
    small = {"stage": 3, "stage3_max_reuse_distance": BLOCK // 2, "stage3_max_live_parameters": BLOCK // 2}
    small |= {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10**6}
    at = planner(small, recompute="full")
    plan = at.plan()
    of_block, of_all = zero_changes(plan)
    distance = of_block["stage3_max_reuse_distance"]
    assert 2 * BLOCK <= distance < 2.1 * BLOCK and of_block["stage3_max_live_parameters"] == distance
    assert of_all["stage3_max_reuse_distance"] > 8 * BLOCK
    longer, kept = at.replan(at.candidate, of_block), at.replan(at.candidate, of_all)
    assert longer is not None and kept is not None
    once = 2 * (4 * BLOCK + 2 * 1000 * 2048 + 2048) * 15 / 16
    assert sent(plan, "all_gather") > 1.2 * sent(longer, "all_gather") > 1.2 * 1.3 * sent(kept, "all_gather")
    assert once <= sent(kept, "all_gather") < 1.3 * once, "one block is released too early"
    assert plan.fullest.peak_bytes < longer.fullest.peak_bytes < kept.fullest.peak_bytes
    [found] = [one for one in advise(plan, at.candidate, at.replan) if "reuse" in one.changes[0]]
    assert found.changes == zero_keys(of_all) and found.plan.time.total_s == kept.time.total_s
    limited = replace(plan, limit_bytes=(longer.fullest.peak_bytes + kept.fullest.peak_bytes) // 2)
    at.limit_bytes = limited.limit_bytes
    [found] = [one for one in advise(limited, at.candidate, at.replan) if "reuse" in one.changes[0]]
    assert found.changes == zero_keys(of_block), "what does not fit is not advised"


def test_one_data_rank_sends_nothing() -> None:
    at = planner({"stage": 2}, nodes=1)
    assert [*zero_changes(at.plan())]
    alone = replace(at.inputs.machines, ranks_per_node=1)
    at.inputs.machines = alone
    assert [*zero_changes(at.plan())] == []


@dataclass(frozen=True)
class Planned:
    """What `advise` reads of a plan."""

    total_s: float
    fits: bool = True

    @property
    def time(self) -> "Planned":
        return self


def test_the_best_values_of_different_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two values of a setting the better one; none that gains less than 2 %, is refused, or does not fit."""
    times = {("a", 1): 8.0, ("a", 2): 7.0, ("b", 1): 9.9, ("c", 1): 9.0, ("d", 1): 5.0, ("e", 1): 9.5, ("f", 1): 6.0}
    monkeypatch.setattr(advice, "neighbours", lambda now, plan: [])
    monkeypatch.setattr(advice, "zero_changes", lambda plan: [{name: value} for name, value in times])

    def replan(candidate: Candidate, keys: Any) -> Any:
        [(name, value)] = keys.items()
        return None if name == "d" else Planned(times[name, value], fits=name != "f")

    found = advise(Planned(10.0), Candidate(), replan)  # type: ignore[arg-type]
    assert [one.changes[0].rpartition(".")[2] for one in found] == ["a=2", "c=1", "e=1"]
