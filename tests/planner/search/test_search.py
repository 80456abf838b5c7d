"""The search of layouts: the same result as trying all, few exact estimates, legality by the checks of `train`."""

import time
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import RunConfig, build_run, load_run
from megatron_ds.errors import ConfigError, TopologyError
from megatron_ds.hf.config import HFModel
from megatron_ds.planner.search.branch_and_bound import GB, Estimate, Limits, search_layouts
from megatron_ds.planner.search.space import EVERYTHING, LAYOUT, Candidate, Space, candidate_of, with_candidate
from megatron_ds.runtime.loaded_model import read_model_section
from megatron_ds.runtime.setup import plan_run
from tests.planner.simple_estimators import SimpleEstimators

EXAMPLES = Path(__file__).parents[3] / "examples" / "plan"
TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


def read(name: str, *overrides: str) -> tuple[RunConfig, HFModel]:
    run = load_run(EXAMPLES / f"{name}.yaml", overrides)
    return run, read_model_section(run.model)


def tiny_run(model: dict[str, Any] = TINY, **sections: Any) -> tuple[RunConfig, HFModel]:
    mapping = {
        "model": {"config": model},
        "deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        "data": {"format": "indexed", "train": ["tokens"], "seq_length": 2048},
        "train": {"steps": 1, "global_batch_size": 24},
        "output": "out",
    }
    run = build_run({**mapping, **sections})
    return run, read_model_section(run.model)


def refusal(candidate: Candidate, space: Space, hf: HFModel) -> str | None:
    try:
        plan_run(with_candidate(space.run, candidate), hf, space.world_size, "cuda")
    except (ConfigError, TopologyError) as problem:
        return str(problem)
    return None


@pytest.mark.parametrize(
    ("name", "nodes", "limit"),
    [("llama3_8b", 1, 80), ("llama3_70b", 32, 30), ("llama3_405b", 512, 40), ("qwen3_235b", 32, 80)],
)
def test_the_result_is_that_of_trying_all(name: str, nodes: int, limit: int) -> None:
    run, hf = read(name)
    space, limits = Space(run, hf.core.shape(), 8 * nodes, 8), Limits(limit * GB)
    simple, every = (SimpleEstimators(run, hf.core.shape(), 8 * nodes) for _ in range(2))
    result = search_layouts(space, hf, "cuda", [simple.lower_bound, simple.exact], limits, 5)

    def fastest() -> Iterator[tuple[tuple[object, ...], Estimate]]:
        layouts = set()
        for candidate, estimate in sorted(((one, every.exact(one)) for one in space), key=lambda pair: pair[1].step_s):
            if limits.hold(estimate) and candidate.layout not in layouts and not refusal(candidate, space, hf):
                layouts.add(candidate.layout)
                yield candidate.layout, estimate

    assert [(one.candidate.layout, one.estimate) for one in result.found] == list(islice(fastest(), 5))
    assert len(simple.exact_calls) < len(every.exact_calls) / 10, "the lower bound rules out most"
    assert result.counts.candidates == len(every.exact_calls)


def test_thousands_of_devices_take_no_time() -> None:
    """The search's own time without that of estimators; a machine that is busy with other tests has a factor of 10."""
    for name in ("llama3_405b", "qwen3_235b"):
        run, hf = read(name)
        simple, started = SimpleEstimators(run, hf.core.shape(), 4096), time.process_time()
        found = search_layouts(
            Space(run, hf.core.shape(), 4096, 8), hf, "cuda", [simple.lower_bound, simple.exact], Limits(80 * GB)
        )
        assert time.process_time() - started < 20, found.counts


def test_no_legal_layout_is_missed() -> None:
    """Every combination of small sizes is in the space if the checks accept it, and else nearly never."""
    run, hf = tiny_run()
    space = Space(run, hf.core.shape(), 8, 4)
    listed, legal = {(one.tensor, one.pipeline, one.context, one.micro_batch_size) for one in space}, set()
    for tensor, pipeline, context, batch in product((1, 2, 3, 4), (1, 2, 3, 4, 6, 8), (1, 2), (1, 2, 3, 4, 6)):
        if refusal(Candidate(tensor, pipeline, context, micro_batch_size=batch), space, hf) is None:
            legal.add((tensor, pipeline, context, batch))
    of_other_batches = {one for one in legal if one[3] not in (1, 2, 4)}
    assert legal - of_other_batches == {one for one in listed if one[3] <= 4}
    assert all(refusal(one, space, hf) is None for one in space)


def test_experts_are_divided_over_data_ranks_too() -> None:
    run, hf = read("qwen3_235b")
    layouts = list(Space(run, hf.core.shape(), 64, 8).layouts())
    assert {one.expert for one in layouts if one.tensor == 1 and one.pipeline == 1} == {1, 2, 4, 8, 16, 32, 64}
    assert {one.expert for one in layouts if one.tensor == 8 and one.pipeline == 4} == {8, 16}
    dense, hf = read("llama3_8b")
    assert {one.expert for one in Space(dense, hf.core.shape(), 64, 8)} == {None}


def test_what_does_not_vary_stays() -> None:
    """`parallel: auto` varies the layout alone, `train.micro_batch_size: auto` the micro-batch alone."""
    run, hf = tiny_run(train={"steps": 1, "global_batch_size": 24, "micro_batch_size": 3, "recompute": "full"})
    layouts = list(Space(run, hf.core.shape(), 4, 4, varies=LAYOUT))
    assert {(one.tensor, one.pipeline) for one in layouts} == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    assert {(one.micro_batch_size, one.recompute, one.zero_stage) for one in layouts} == {(3, "full", 1)}
    batches = list(Space(run, hf.core.shape(), 4, 4, varies=frozenset({"micro_batch_size"})))
    assert [one.micro_batch_size for one in batches] == [1, 2]
    assert {(one.layout, one.recompute) for one in batches} == {(candidate_of(run).layout, "full")}
    (own,) = Space(run, hf.core.shape(), 4, 4, varies=frozenset())
    assert own == candidate_of(run)
    everything = set(Space(run, hf.core.shape(), 4, 4, varies=EVERYTHING | {"compile"}))
    assert {one.compile for one in everything} == {False, True}
    assert {one.keep_attention for one in everything} == {False, True}
    assert not any(one.keep_attention for one in everything if one.compile)  # train refuses it


def test_a_candidate_changes_its_own_keys_alone() -> None:
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/scratch"}, "reduce_bucket_size": 1000}
    run, _ = tiny_run(deepspeed={"bf16": {"enabled": True}, "zero_optimization": zero}, parallel={"tensor": 2})
    assert candidate_of(run) == Candidate(2, zero_stage=3, offload_param=True)
    changed = with_candidate(run, Candidate(4, 2, 2, sequence=True, zero_stage=1, micro_batch_size=2))
    assert changed.deepspeed == {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
    }
    assert candidate_of(changed) == Candidate(4, 2, 2, sequence=True, zero_stage=1, micro_batch_size=2)
    assert changed.data == run.data and changed.optimizer == run.optimizer
    offloaded = with_candidate(run, Candidate(zero_stage=3, offload_optimizer=True, offload_param=True))
    assert isinstance(offloaded.deepspeed, dict)
    assert offloaded.deepspeed["zero_optimization"]["offload_param"] == zero["offload_param"]
    assert offloaded.deepspeed["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_the_host_holds_what_fits_nowhere_else() -> None:
    run, hf = read("llama3_8b")
    simple = SimpleEstimators(run, hf.core.shape(), 1)
    space, limits = Space(run, hf.core.shape(), 1, 1, offload=True), Limits(60 * GB)
    (best, *_) = search_layouts(space, hf, "cuda", [simple.lower_bound, simple.exact], limits).found
    assert best.candidate.offload_optimizer and best.estimate.host_bytes > 50 * GB
    with pytest.raises(ConfigError, match=r"no layout of 1 ranks fits: the smallest found .* of host memory a rank"):
        tight = Limits(60 * GB, 50 * GB)
        search_layouts(space, hf, "cuda", [simple.lower_bound, simple.exact], tight)


def test_what_is_missing_is_named() -> None:
    run, hf = read("llama3_70b")
    simple = SimpleEstimators(run, hf.core.shape(), 8)
    with pytest.raises(
        ConfigError, match=r"no layout of 8 ranks fits: the smallest found \(.*\) needs 1\d\d\.\d GB on"
    ):
        search_layouts(
            Space(run, hf.core.shape(), 8, 8), hf, "cuda", [simple.lower_bound, simple.exact], Limits(80 * GB)
        )
    run, hf = tiny_run(train={"steps": 1, "global_batch_size": 1})
    with pytest.raises(TopologyError, match=r"global_batch_size=1 cannot be divided over 4096 ranks.* nearest: 128"):
        search_layouts(Space(run, hf.core.shape(), 4096, 8), hf, "cuda", [lambda one: Estimate(1.0)], Limits())
    run, hf = tiny_run(deepspeed={"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}})
    fixed = Space(run, hf.core.shape(), 4, 4, varies=LAYOUT)
    with pytest.raises(ConfigError, match=r"zero_optimization.stage=0 .* cannot run with fp16"):
        search_layouts(fixed, hf, "cuda", [lambda one: Estimate(1.0)], Limits())
