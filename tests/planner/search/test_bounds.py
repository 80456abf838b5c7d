"""Bounds are bounds, and the search finds what trying every candidate finds: models, memory and time of real plans.

Every candidate of a small space is estimated by every estimator. None may say more than a later one, so the factors
that the bounds have are shown to be enough. Then searches under several limits of memory are compared with the list of
all exact estimates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from megatron_ds.config import build_run
from megatron_ds.planner.memory.stage import plan_memory
from megatron_ds.planner.plan import make_plan
from megatron_ds.planner.search.branch_and_bound import Estimate, Limits, search_layouts
from megatron_ds.planner.search.find_layouts import PlannedEstimators, SearchInput
from megatron_ds.planner.search.space import EVERYTHING, LAYOUT, Candidate, Space
from megatron_ds.planner.trace.layers import trace_layers
from tests.planner.search.test_published_searches import searched
from tests.planner.search.test_search import refusal

SIZES = {"vocab_size": 4096, "hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 4096}
DENSE = {**SIZES, "model_type": "llama", "intermediate_size": 1536, "num_hidden_layers": 5, "num_key_value_heads": 4}
EXPERTS = {
    **SIZES,
    "model_type": "qwen3_moe",
    "intermediate_size": 3072,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0, 1],
}
MANY_EXPERTS = {
    **EXPERTS,
    "hidden_size": 2048,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 2,
    "mlp_only_layers": [],
    "num_experts": 64,
    "num_experts_per_tok": 8,
}


@dataclass(frozen=True)
class Case:
    """A search.

    Attributes:
        name: of the case.
        model: fields of its config.json.
        precision: of the run.
        batch: samples of a step.
        ranks: number of them.
        varies: fields of candidates.
        offload: what may be moved to the host.
        length: positions of a sample.
        zero: keys of `zero_optimization`.
    """

    name: str
    model: dict[str, Any]
    precision: str = "bf16"
    batch: int = 16
    ranks: int = 8
    varies: frozenset[str] = EVERYTHING
    offload: bool = False
    length: int = 4096
    zero: dict[str, int] = field(default_factory=dict)

    def searched(self) -> SearchInput:
        precision = {} if self.precision == "fp32" else {self.precision: {"enabled": True}}
        run = build_run(
            {
                "model": {"config": self.model},
                "deepspeed": {**precision, "zero_optimization": {"stage": 1, **self.zero}},
                "data": {"format": "indexed", "train": ["tokens"], "seq_length": self.length},
                "optimizer": {"lr": 1e-4},
                "train": {"steps": 1, "global_batch_size": self.batch},
                "output": "out",
            }
        )
        return searched(run, 1, self.ranks, "h100", None)


FEW, SOME = EVERYTHING - {"keep_attention", "recompute"}, EVERYTHING - {"keep_attention"}
FEW_WEIGHTS = {"stage3_prefetch_bucket_size": 200_000, "stage3_max_reuse_distance": 1_000_000}
CASES = [
    Case("dense", DENSE, batch=2, ranks=4, varies=SOME, length=2048, zero=FEW_WEIGHTS),
    Case("experts", EXPERTS, batch=4, ranks=4, varies=FEW, length=1024),
    Case("experts on many rows", MANY_EXPERTS, batch=64, ranks=4, varies=LAYOUT | {"micro_batch_size"}, length=1024),
    *(
        pytest.param(one, marks=pytest.mark.sweep)
        for one in (
            Case("dense on 8", DENSE),
            Case("dense on 8, offloaded", DENSE, batch=8, varies=SOME, offload=True, length=2048),
            Case("dense in fp32", DENSE, "fp32", batch=8, varies=SOME),
            Case("dense in fp16", DENSE, "fp16", batch=8, varies=SOME),
            Case("dense on 8, few weights gathered", DENSE, batch=8, varies=FEW, zero=FEW_WEIGHTS),
            Case("short", DENSE, length=1024, batch=64, varies=FEW),
            Case("experts on 8", EXPERTS, batch=16, varies=SOME),
            Case("experts on 8, offloaded", EXPERTS, batch=8, varies=SOME, offload=True, length=2048),
        )
    ),
]
of_case = pytest.mark.parametrize("case", CASES, ids=lambda one: one.name)


@cache
def _tried(name: str) -> "Tried":
    (case,) = [one for one in map(_case, CASES) if one.name == name]
    return Tried(case)


def _case(one: Any) -> Case:
    return one if isinstance(one, Case) else one.values[0]


class Tried:
    """Every legal candidate of a case by every estimator."""

    def __init__(self, case: Case) -> None:
        self.searched = given = case.searched()
        self.space = Space(given.run, given.hf.core.shape(), case.ranks, case.ranks, case.varies, case.offload)
        self.estimators = PlannedEstimators(given, self.space, Limits())
        self.by_estimator: dict[Candidate, list[Estimate]] = {
            one: [estimator(one) for estimator in self.estimators.ordered]
            for one in self.space
            if refusal(one, self.space, given.hf) is None
        }

    def remembered(self, number: int) -> Callable[[Candidate], Estimate]:
        return lambda one: self.by_estimator[one][number]


@of_case
def test_no_estimator_says_more_than_a_later_one(case: Case) -> None:
    tried = _tried(case.name)
    worst: dict[tuple[int, str], tuple[float, str]] = {}
    for candidate, found in tried.by_estimator.items():
        for number, bound in enumerate(found[:-1]):
            for what in ("step_s", "device_bytes", "host_bytes"):
                exact = getattr(found[-1], what)
                share = getattr(bound, what) / exact if exact else float(getattr(bound, what) > 0)
                key = (number, what)
                worst[key] = max(worst.get(key, (0.0, "")), (share, candidate.describe()))
    print(len(tried.by_estimator), *(f"{key}: {share:.4f} {name}" for key, (share, name) in worst.items()), sep="\n")
    assert all(share <= 1 + 1e-9 for share, _ in worst.values()), worst


@of_case
def test_settings_of_activations_are_in_the_order_of_their_time(case: Case) -> None:
    tried = _tried(case.name)
    for chain in tried.space.chains():
        seconds = [tried.by_estimator[one][-1].step_s for one in chain if one in tried.by_estimator]
        assert seconds == sorted(seconds), [one.describe() for one in chain]


@of_case
def test_the_search_finds_what_trying_all_finds(case: Case) -> None:
    tried = _tried(case.name)
    peaks = sorted(found[-1].device_bytes for found in tried.by_estimator.values())
    for limit in (peaks[-1], peaks[len(peaks) // 2], peaks[len(peaks) // 10], peaks[0]):
        limits, expected = Limits(limit), {}
        fitting = {one: found[-1].step_s for one, found in tried.by_estimator.items() if limits.hold(found[-1])}
        usual = {one: step_s for one, step_s in fitting.items() if not is_offloaded(one)}  # others are not tried then
        for candidate, step_s in sorted((usual or fitting).items(), key=lambda pair: pair[1]):
            expected.setdefault(candidate.layout, step_s)
        estimators = [tried.remembered(number) for number in range(len(tried.estimators.ordered))]
        found = search_layouts(tried.space, tried.searched.hf, "cuda", estimators, limits, 8).found
        assert [one.estimate.step_s for one in found] == list(expected.values())[:8]
        assert {one.candidate.layout: one.estimate.step_s for one in found}.items() <= expected.items()


def is_offloaded(one: Candidate) -> bool:
    return one.offload_activations or one.offload_optimizer or one.offload_param


def _every_stage(estimators: PlannedEstimators, candidate: Candidate) -> Sequence[int]:
    given = estimators.given(candidate)
    traces = trace_layers(given.layers, given.trace_setting())
    return [plan_memory(given, traces, stage).peak_bytes for stage in range(candidate.pipeline)]


@pytest.mark.parametrize(
    ("case", "pipeline"),
    [
        (Case("dense", {**DENSE, "num_hidden_layers": 11}, batch=8, ranks=8), 8),
        (Case("experts", {**EXPERTS, "num_hidden_layers": 9}, batch=8, ranks=4), 4),
        pytest.param(Case("large head", {**DENSE, "num_hidden_layers": 9, "vocab_size": 65536}, ranks=8), 8),
        pytest.param(
            Case("experts last", {**EXPERTS, "num_hidden_layers": 10, "mlp_only_layers": [0, 1, 2, 3]}, ranks=8),
            8,
            marks=pytest.mark.sweep,
        ),
        pytest.param(Case("fp32", {**DENSE, "num_hidden_layers": 10}, "fp32"), 4, marks=pytest.mark.sweep),
    ],
    ids=lambda one: getattr(one, "name", None),
)
def test_the_fullest_stage_is_among_those_that_are_planned(case: Case, pipeline: int) -> None:
    given = case.searched()
    space = Space(given.run, given.hf.core.shape(), case.ranks, case.ranks)
    estimators = PlannedEstimators(given, space, Limits())
    for candidate in (Candidate(pipeline=pipeline), Candidate(pipeline=pipeline, recompute="full")):
        peaks = _every_stage(estimators, candidate)
        assert estimators.exact(candidate).device_bytes == max(peaks), peaks


def test_an_exact_estimate_is_the_plan() -> None:
    tried = _tried("experts")
    layouts = (
        Candidate(pipeline=2, expert=2),
        Candidate(2, sequence=True, expert=4, micro_batch_size=2),
        Candidate(expert=1, zero_stage=2),
        Candidate(expert=1, zero_stage=3, recompute="full"),
    )
    for candidate in layouts:
        given, estimate = tried.estimators.given(candidate), tried.estimators.exact(candidate)
        plan = make_plan(given, tried.searched.device, tried.searched.network)
        assert estimate.step_s == pytest.approx(plan.time.total_s, rel=1e-12)
        assert (estimate.device_bytes, estimate.host_bytes) == (
            plan.fullest.peak_bytes,
            max(one.host_bytes for one in plan.memory),
        )
