"""Planned calls and bytes are those that a step of real ranks sends, exactly, by axis and kind.

What is counted are the methods of torch's process groups, below every function of Python's. Layers are traced and the
engine's traffic is derived, so that neither can copy the other's mistakes.
"""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ds.parallel.grid import Grid
from megatron_ds.planner.trace import trace_layers
from megatron_ds.planner.traffic.wire import MESSAGE, plan_wire, table_of
from tests.halves import halved
from tests.parallel.wire_calls import _SENT, recording
from tests.parity.cases import Recipe
from tests.parity.ours import Place
from tests.planner.wire_cases import Traffic, by_ranks, counted, loaded, planned, seen, with_settings
from tests.ranks import run_grid

FP32, BF16 = Recipe(), Recipe(precision="bf16")
MUON, ADAFACTOR = Recipe(optimizer="muon"), Recipe(optimizer="adafactor")
SMALL = {"reduce_bucket_size": 3000}
# So few weights may be gathered at a time that most are gathered twice, and some of them again by a prefetch.
FEW = {"stage3_max_live_parameters": 20000, "stage3_max_reuse_distance": 8000, "stage3_prefetch_bucket_size": 3000}
HOST = {"offload_optimizer": {"device": "cpu"}}
FROZEN = Recipe(frozen=("model.layers.[01].*", "model.embed_tokens*"))
FROZEN_LATER = Recipe(frozen=("model.layers.[23].*",))  # they are computed again, because gradients pass through them
MOE = "mixtral-four-experts"

COVERING = [
    ("gpt2", Place(1, 2, 2, 1), BF16),  # a tied embedding in two stages
    ("qwen3", Place(2, 1, 1, 1, True, recompute="full"), FP32),  # norms of heads
    ("bert-pretraining", with_settings(Place(1, 1, 2, 3, recompute="selective"), **FEW, **SMALL), FP32),
    (MOE, Place(1, 1, 2, 2, expert=2), MUON),
    ("llama", Place(cp=2, method="ring"), FP32),
    ("t5-gated", Place(2, 1, 1, 0), FP32),
]
MORE = [
    ("llama", Place(1, 1, 2, 0), FP32),
    ("llama", Place(1, 1, 2, 1), BF16),
    ("llama", Place(2, 1, 1, 1), FP32),
    ("llama", Place(2, 2, 1, 1, True), FP32),
    ("qwen2-2kv", Place(4, 1, 1, 1), ADAFACTOR),  # ranks that share key heads
    ("qwen3", Place(2, 1, 2, 2, True), FP32),
    ("bert-pretraining", Place(2, 1, 2, 0), FP32),
    ("bert-pretraining", Place(1, 2, 1, 1), FP32),
    ("t5-gated", Place(1, 2, 2, 1), FP32),
    ("t5-gated", Place(2, 2, 1, 1, True), FP32),
    ("llama", with_settings(Place(1, 1, 2, 2), **SMALL), FP32),
    ("llama", with_settings(Place(1, 1, 4, 1), **SMALL), FP32),
    ("llama", with_settings(Place(1, 1, 4, 1), **SMALL, use_multi_rank_bucket_allreduce=False), FP32),
    ("llama", with_settings(Place(1, 1, 2, 1), **SMALL), BF16),
    ("llama", Place(1, 1, 2, 3), BF16),
    ("llama", with_settings(Place(1, 1, 2, 3, recompute="full"), **FEW, **SMALL), FP32),
    ("gpt2", with_settings(Place(1, 1, 4, 3), **FEW, **SMALL), FP32),
    ("t5-gated", with_settings(Place(1, 1, 2, 3), **FEW, **SMALL), FP32),
    ("llama", with_settings(Place(1, 1, 4, 3), **FEW, **SMALL, zero_hpz_partition_size=2), FP32),
    ("llama", with_settings(Place(1, 1, 2, 3), stage3_use_all_reduce_for_fetch_params=True), FP32),
    ("llama", with_settings(Place(1, 1, 2, 3), reduce_scatter=False), FP32),
    ("llama", with_settings(Place(1, 1, 2, 3), **HOST, offload_param={"device": "cpu"}), FP32),
    ("llama", with_settings(Place(1, 1, 2, 3), **HOST, sub_group_size=4000), FP32),
    ("llama", with_settings(Place(1, 1, 2, 2), **HOST), FP32),
    ("gpt2", with_settings(Place(1, 2, 2, 1), **HOST), BF16),
    ("llama", Place(1, 1, 2, 2), FROZEN),
    ("llama", with_settings(Place(1, 1, 2, 3), **FEW, **SMALL), FROZEN),
    ("llama", with_settings(Place(1, 1, 2, 3, recompute="full"), **FEW, **SMALL), FROZEN_LATER),
    ("llama", Place(2, 1, 2, 1), MUON),
    ("gpt2", Place(1, 2, 2, 1), MUON),
    ("llama", Place(1, 1, 2, 3), ADAFACTOR),
    ("llama", Place(2, 1, 1, 1, True, cp=2, method="ulysses"), FP32),
    ("llama", Place(1, 2, 1, 1, cp=2, method="gather", ulysses=1), FP32),
    ("llama", Place(1, 1, 1, 3, cp=4, method="ring", ulysses=2), FP32),
    ("mistral", Place(cp=2, method="gather", ulysses=1), FP32),
    ("bert-pretraining", Place(cp=2, method="gather", ulysses=1), FP32),
    (MOE, Place(2, 1, 1, 1), FP32),
    (MOE, Place(2, 1, 2, 2, True, expert=4), FP32),
    (MOE, Place(1, 1, 2, 3, expert=2), FP32),
    (MOE, Place(1, 2, 2, 1, expert=2), FP32),
    (MOE, Place(2, 1, 1, 0, True, expert=1), FP32),
    (MOE, Place(1, 1, 2, 1, expert=2), BF16),
]


def _both(grid: Grid, case: str, place: Place, recipe: Recipe) -> tuple[Traffic, Traffic]:
    model = loaded(case, recipe)
    wire = counted(grid, model, place, recipe)
    given = planned(model, place, recipe)
    traces = trace_layers(given.layers, given.trace_setting())
    return seen(wire, grid), by_ranks(plan_wire(given, grid.pipeline.rank, traces).total, grid)


def _name_of(recipe: Recipe) -> str:
    return f"{recipe.optimizer}-{recipe.precision}{'-frozen' * bool(recipe.frozen)}"


@pytest.mark.parametrize(
    ("case", "place", "recipe"),
    [*COVERING, *(pytest.param(*one, marks=pytest.mark.sweep) for one in MORE)],
    ids=lambda one: _name_of(one) if isinstance(one, Recipe) else str(one),
)
def test_planned_bytes_are_those_that_are_sent(case: str, place: Place, recipe: Recipe) -> None:
    model = loaded(case, recipe)
    given = planned(model, place, recipe)
    expert = place.expert if model.hf.core.shape().num_experts else None
    found = run_grid(_both, place.layout, case, place, recipe, expert=expert, ulysses=given.engine.context.ulysses)
    for rank, (sent, expected) in enumerate(found):
        assert sent.bytes == expected.bytes, rank
        assert sent.calls == expected.calls, rank


def test_a_plan_needs_no_ranks_and_grows_with_micro_batches() -> None:
    """Layers and stages send in each micro-batch, and ZeRO-1 reduces once."""
    place = Place(2, 2, 2, 1, True)
    model = loaded("llama", FP32)
    given = planned(model, place, replace(FP32, global_batch=8))
    twice = planned(model, place, replace(FP32, global_batch=16, micro_batch=2))
    assert twice.num_micro_batches == 2 * given.num_micro_batches
    assert twice.config.micro_batch_size == given.config.micro_batch_size
    traces = trace_layers(given.layers, given.trace_setting())
    one, two = (plan_wire(run, 0, traces).by_axis for run in (given, twice))
    for axis, factor in ((("tensor", "message"), 2), (("pipeline", "message"), 2), (("shard", "all_reduce"), 1)):
        assert two[axis].num_bytes == factor * one[axis].num_bytes > 0
        assert two[axis].calls == factor * one[axis].calls


@pytest.mark.parametrize(
    ("case", "place"),
    halved(
        [
            ("llama", Place(2, 1, 2, 2, True)),
            ("qwen3", Place(2, 2, 1, 1, True, recompute="full")),
            (MOE, Place(1, 1, 2, 2, expert=2)),
            ("llama", Place(1, 1, 2, 3)),
            ("gpt2", Place(2, 1, 1, 1)),
            ("llama", Place(cp=2, method="ring")),
            ("bert-pretraining", Place(2, 1, 2, 2)),
            ("t5-gated", Place(2, 1, 1, 1)),
        ]
    ),
    ids=str,
)
def test_gpus_send_the_bytes_of_cpus(case: str, place: Place) -> None:
    """Other kernels and NCCL's collectives, but the same bytes along each axis; messages are between stages alone."""
    model = loaded(case, BF16)
    on_cpus = planned(model, place, BF16)
    on_gpus = replace(on_cpus, machines=replace(on_cpus.machines, device_type="cuda"))
    sent = []
    for given in (on_cpus, on_gpus):
        traces = trace_layers(given.layers, given.trace_setting())
        sent.append(plan_wire(given, 0, traces))
    assert sent[0].total.sent_bytes == sent[1].total.sent_bytes
    assert {axis for axis, kind in sent[1].by_axis if kind == MESSAGE} <= {"pipeline", "ring", "context"}


def _one_of_each(grid: Grid) -> dict[str, Fraction]:
    group, size = grid.world.group, grid.world.size
    x, whole = torch.ones(4), torch.ones(4 * size)
    with recording() as wire:
        dist.all_reduce(x, group=group)
        dist.all_gather_into_tensor(whole, x, group=group)
        dist.all_to_all_single(torch.empty_like(whole), whole, group=group)
        dist.broadcast(x, 0, group=group)
        dist.all_gather([torch.empty(4) for _ in range(size)], x, group=group)
        if grid.rank == 0:
            dist.send(x, 1)
        elif grid.rank == 1:
            dist.recv(x, 0)
    return {f"{kind}{number}": size * number for (kind, _, size), number in wire.calls.items()}


def test_all_that_a_process_sends_is_recorded() -> None:
    """By hand for 4 numbers of fp32 on 3 ranks; and no method of torch's process groups is forgotten."""
    ring = Fraction(16 * 2, 3)
    first = run_grid(_one_of_each, planned_layout(3))[0]
    assert first == {
        "all_reduce1": 2 * ring,
        "all_gather2": 2 * 3 * ring,
        "all_to_all1": 3 * ring,
        "broadcast1": ring,
        "send in the world1": Fraction(16),
    }
    silent = {"recv", "recv_anysource", "barrier", "monitored_barrier", "send"}
    words = ("gather", "reduce", "scatter", "to_all", "alltoall", "broadcast", "send", "recv", "barrier")
    methods = {name for name in vars(dist.ProcessGroup) if any(word in name for word in words)}
    assert methods <= {*_SENT, *silent}


def planned_layout(ranks: int) -> Any:
    return Place(1, 1, ranks).layout


def test_tables_are_sorted_and_whole() -> None:
    place = Place(2, 1, 2, 2)
    given = planned(loaded("llama", FP32), place, FP32)
    work = plan_wire(given, 0, trace_layers(given.layers, given.trace_setting())).total
    table = table_of(work)
    assert list(table) == sorted(table)
    assert sum((sent.num_bytes for sent in table.values()), Fraction(0)) == sum(work.sent_bytes.values())
