"""`parallel.context`: its values and messages, and how the ranks of a sequence are divided by kind of exchange."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ds.config import (
    ContextPlan,
    ContextSection,
    DeepSpeedSummary,
    EngineConfig,
    ModelShape,
    ParallelSection,
    RunConfig,
    build_section,
    check_context_length,
    check_experts,
    check_run,
    describe_context,
    dump_run,
    load_deepspeed,
    load_run,
    plan_context,
)
from megatron_ds.errors import ConfigError, TopologyError

SHAPE = ModelShape(
    num_layers=4, num_attention_heads=12, ffn_size=64, hidden_size=48, vocab_size=101, max_positions=None
)
CAPPED = replace(SHAPE, score_options=("soft caps",))
ZERO_1 = DeepSpeedSummary(1, "fp32", False, False)
ENCODER = replace(SHAPE, causal=False)


@pytest.mark.parametrize(
    "section, shape, tensor, expected",
    [
        ({"size": 1}, SHAPE, 1, (1, 1, "gather", False)),
        ({"size": 4}, SHAPE, 1, (4, 1, "gather", False)),
        ({"size": 4}, SHAPE, 2, (2, 2, "ring", True)),
        ({"size": 8}, SHAPE, 1, (4, 2, "ring", True)),
        ({"size": 5}, SHAPE, 1, (1, 5, "ring", True)),
        ({"size": 8}, CAPPED, 1, (4, 2, "gather", True)),
        ({"size": 8}, ENCODER, 1, (4, 2, "ring", False)),
        ({"size": 4, "method": "ulysses"}, CAPPED, 1, (4, 1, "gather", False)),
        ({"size": 4, "method": "ring"}, SHAPE, 1, (1, 4, "ring", True)),
        ({"size": 4, "method": "ring"}, CAPPED, 1, (1, 4, "ring", True)),
        ({"size": 4, "method": "gather"}, SHAPE, 1, (1, 4, "gather", True)),
        ({"size": 8, "method": "gather", "ulysses": 2}, SHAPE, 2, (2, 4, "gather", True)),
        ({"size": 8, "ulysses": 2}, SHAPE, 1, (2, 4, "ring", True)),
        ({"size": 8, "ulysses": 2}, CAPPED, 1, (2, 4, "gather", True)),
    ],
)
def test_ranks_are_divided(section: dict, shape: ModelShape, tensor: int, expected: tuple) -> None:
    plan = plan_context(ContextSection(**section), shape, tensor)
    assert (plan.ulysses, plan.ring, plan.method, plan.zigzag) == expected
    assert plan.size == section["size"]


@pytest.mark.parametrize(
    "section, tensor, message",
    [
        (
            {"size": 8, "method": "ulysses"},
            1,
            "parallel.context=8 with parallel.context.method=ulysses does not divide the 12 query heads of a tensor "
            "rank (num_attention_heads=12); nearest: 6 or 12, or try parallel.context.method=auto",
        ),
        (
            {"size": 8, "ulysses": 4},
            2,
            "parallel.context.ulysses=4 does not divide the 6 query heads of a tensor rank (num_attention_heads=12 / "
            "parallel.tensor=2); nearest: 2",
        ),
    ],
)
def test_heads_that_do_not_divide_are_refused(section: dict, tensor: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        plan_context(ContextSection(**section), SHAPE, tensor)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"size": 8, "ulysses": 3},
            "parallel.context.ulysses=3 does not divide parallel.context.size=8; nearest: 2 or 4",
        ),
        ({"size": 8, "ulysses": 16}, "parallel.context.ulysses=16 does not divide parallel.context.size=8; nearest: 8"),
        (
            {"size": 8, "ulysses": 2, "method": "ulysses"},
            "parallel.context.ulysses=2 leaves 4 parts of parallel.context.size=8 to another method than "
            "parallel.context.method=ulysses; nearest: 8, or try method gather or ring",
        ),
        (
            {"size": 8, "ulysses": 8, "method": "ring"},
            "parallel.context.ulysses=8 of parallel.context.size=8 leaves no ranks for parallel.context.method=ring; "
            "try method ulysses, or a smaller ulysses",
        ),
        ({"size": 0}, "parallel.context.size=0 must be at least 1; nearest: 1"),
        (
            {"size": 2, "method": "rings"},
            "parallel.context.method=rings is not one of auto, ulysses, gather, ring; did you mean ring?",
        ),
        ({"size": 2, "ring": 2}, "parallel.context.ring: unknown key; legal here: method, size, ulysses"),
        (
            {"method": "ring"},
            "parallel.context.size is missing, without which parallel.context.method=ring does nothing; add it, as in "
            "{size: 2, method: ring}",
        ),
    ],
)
def test_wrong_values_of_the_section(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build_section(ContextSection, given, "parallel.context")


@pytest.mark.parametrize("given", [True, "two", [2], 1.5])
def test_context_is_a_number_or_a_mapping(given: object) -> None:
    with pytest.raises(ConfigError, match=r"^parallel\.context=.* is neither a number of ranks nor a mapping; write 2"):
        ParallelSection(context=given)
    with pytest.raises(ConfigError, match=r"^parallel\.context=0 is less than one rank; nearest: 1$"):
        ParallelSection(context=0)


@pytest.mark.parametrize("given", [1, 8, {"size": 8, "method": "ring"}, {"size": 8, "ulysses": 2}])
def test_the_section_is_written_as_it_was_given(given: int | dict) -> None:
    assert ParallelSection(context=given).model_dump()["context"] == given


@pytest.mark.parametrize(
    "plan, parts, length",
    [
        (ContextPlan(4, 1), 1, 4),
        (ContextPlan(4, 1), 2, 8),
        (ContextPlan(1, 4, zigzag=True), 1, 8),
        (ContextPlan(1, 4), 1, 4),
        (ContextPlan(2, 2, zigzag=True), 1, 8),
        (ContextPlan(1, 2, zigzag=True), 3, 12),
    ],
)
def test_lengths_that_need_no_padding(plan: ContextPlan, parts: int, length: int) -> None:
    assert plan.multiple_of(parts) == length


def test_the_choice_is_stated_with_its_reason() -> None:
    assert plan_context(ContextSection(size=8), CAPPED, 1).describe() == (
        "8 = ulysses 4 x gather 2, zigzag: 4 is the largest divisor of 8 that divides the 12 query heads of a tensor "
        "rank; no kernel with a log-sum-exp has soft caps, so keys and values are fetched"
    )
    assert plan_context(ContextSection(size=5), SHAPE, 1).reason.startswith(
        "no divisor of 5 divides the 12 query heads"
    )
    assert plan_context(ContextSection(size=4), SHAPE, 1).describe() == (
        "4 = ulysses 4: 4 divides the 12 query heads of a tensor rank"
    )
    assert plan_context(ContextSection(size=4, method="ring"), ENCODER, 1).describe() == ("4 = ring 4: as given")


def test_ranks_and_batches_of_a_run(make_run: Callable[..., RunConfig]) -> None:
    def data_ranks(world_size: int, context: int, **parallel: int) -> int:
        run = make_run(parallel={"context": context, **parallel}, train={"global_batch_size": 6})
        return check_run(run, SHAPE, ZERO_1, world_size, "cpu")

    assert data_ranks(4, context=4) == 1 and data_ranks(24, context=2, tensor=2, pipeline=2) == 3
    assert data_ranks(8, context=8, tensor=1) == 1, "samples are divided over data ranks alone"
    with pytest.raises(TopologyError) as caught:
        data_ranks(6, context=4)
    assert str(caught.value) == (
        "parallel.tensor=1 * parallel.pipeline=1 * parallel.context=4 = 4 does not divide the number of ranks 6; "
        "nearest: 4 or 8 ranks; or, with 6, parallel.context=3 or 6"
    )
    parallel = make_run(parallel={"context": 2, "tensor": 2, "expert": 8}).parallel
    assert (parallel.model_ranks, parallel.least_ranks) == (4, 8)


def test_experts_are_divided_over_context_ranks_too() -> None:
    config = EngineConfig(parallel=ParallelSection(tensor=2, context=ContextSection(size=2), expert=4))
    check_experts(config, replace(SHAPE, num_experts=8), {}, data_size=1)
    config = EngineConfig(parallel=ParallelSection(tensor=2, context=ContextSection(size=2), expert=8))
    with pytest.raises(TopologyError) as caught:
        check_experts(config, replace(SHAPE, num_experts=8), {}, data_size=1)
    assert str(caught.value) == (
        "parallel.expert=8 does not divide the 4 ranks of a pipeline stage (parallel.tensor=2 * parallel.context=2 * 1 "
        "data ranks); nearest: parallel.expert=4"
    )


def test_shared_memory_is_for_tensor_ranks_alone(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(parallel={"tensor": 2, "context": 2, "shared_memory": True})
    with pytest.raises(ConfigError, match=r"try false, or 2 ranks and parallel\.context=1$"):
        check_run(run, SHAPE, ZERO_1, 4, "cpu")


def test_lengths_are_padded_unless_the_rope_depends_on_them(make_run: Callable[..., RunConfig]) -> None:
    run = make_run(parallel={"context": 4, "tensor": 2, "sequence": True}, data={"seq_length": 30})
    plan = plan_context(run.parallel.context, SHAPE, 2)
    check_run(run, SHAPE, ZERO_1, 8, "cpu")
    check_context_length(run.data, run.parallel, plan)
    assert describe_context(run.data, run.parallel, plan).endswith("; sequences of 30 positions are padded to 32")
    even = run.data.model_copy(update={"seq_length": 32})
    assert describe_context(even, run.parallel, plan) == plan.describe()
    stretched = plan_context(run.parallel.context, replace(SHAPE, length_ropes=("dynamic",)), 2)
    with pytest.raises(TopologyError) as caught:
        check_context_length(run.data, run.parallel, stretched)
    assert str(caught.value) == (
        "data.seq_length=30 is not divisible by 16, which parallel.context=4 needs here: it would be padded, and the "
        "model's rope type dynamic depends on the length; nearest: 16 or 32"
    )


@pytest.mark.parametrize("key", ["sequence_parallel", "sequence_parallel_size"])
def test_deepspeed_divides_no_sequences_itself(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_deepspeed({key: 2})
    assert str(caught.value) == (
        f"deepspeed.{key} (run file): megatron_ds does not run with it: set parallel.context in the run file"
    )


@pytest.mark.parametrize("name", ["cp", "context_parallel_size", "parallel.cp", "ulysses_size"])
def test_other_trainers_names_are_known(run_file: Callable[..., Path], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: unknown key; did you mean parallel\.context\?$"):
        load_run(run_file(), [f"{name}=2"])


def test_the_run_file_is_written_with_its_context(run_file: Callable[..., Path]) -> None:
    run = load_run(run_file(), ["parallel.context.size=4", "parallel.context.method=ring"])
    assert load_run(run_file(dump_run(run))) == run
    plain = load_run(run_file(), ["parallel.context=4"])
    assert plain.parallel.context == ContextSection(size=4) and "context: 4" in dump_run(plain)
