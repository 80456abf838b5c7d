"""Which runs can exist on which ranks: each rule's text, and sweeps that try the proposed values."""

import itertools
import re
from dataclasses import replace

import pytest

from megatron_ds.config import DeepSpeedSummary, ModelShape, check_run, summarize_deepspeed
from megatron_ds.config.checks import nearest
from megatron_ds.errors import ConfigError, TopologyError

SHAPE = ModelShape(num_layers=4, num_attention_heads=8, ffn_size=64, hidden_size=32, vocab_size=101, max_positions=None)
ZERO_1 = DeepSpeedSummary(1, "fp32", False, False)


def refusal(run, shape=SHAPE, facts=ZERO_1, world_size=1, device_type="cpu", kind=ConfigError):
    with pytest.raises(kind) as caught:
        check_run(run, shape, facts, world_size, device_type)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def proposed(message, after="nearest: "):
    """The integers of `4 or 8` behind the last `after`."""
    return [int(word) for word in re.match(r"[0-9]+( or [0-9]+)*", message.split(after)[-1])[0].split(" or ")]


def test_data_size(make_run):
    run = make_run(parallel={"tensor": 2, "pipeline": 2}, train={"global_batch_size": 12, "micro_batch_size": 2})
    assert check_run(run, SHAPE, ZERO_1, 4, "cpu") == 1
    assert check_run(run, SHAPE, ZERO_1, 12, "cpu") == 3
    assert check_run(make_run(), SHAPE, ZERO_1, 8, "cpu") == 8


def test_tensor_must_divide_heads_and_mlp(make_run):
    run = make_run(parallel={"tensor": 3})
    assert refusal(run, kind=TopologyError) == (
        "parallel.tensor=3 does not divide num_attention_heads=8; nearest: 2 or 4"
    )
    run = make_run(parallel={"tensor": 4})
    assert refusal(run, replace(SHAPE, ffn_size=66)) == "parallel.tensor=4 does not divide ffn_size=66; nearest: 2"
    assert check_run(run, SHAPE, ZERO_1, 4, "cpu") == 1


@pytest.mark.parametrize("sizes", itertools.product([6, 8, 12], [24, 30, 64]))
def test_proposed_tensor_degrees_pass(make_run, sizes):
    heads, ffn = sizes
    shape = replace(SHAPE, num_attention_heads=heads, ffn_size=ffn)
    for tensor in range(1, 17):
        run = make_run(parallel={"tensor": tensor})
        if all(size % tensor == 0 for size in sizes):
            assert check_run(run, shape, ZERO_1, tensor, "cpu") == 1
            continue
        values = proposed(refusal(run, shape, world_size=tensor, kind=TopologyError))
        for value in values:
            assert check_run(make_run(parallel={"tensor": value}), shape, ZERO_1, value, "cpu") == 1
        legal = [t for t in range(1, 65) if all(size % t == 0 for size in sizes)]
        assert max(t for t in legal if t < tensor) in values
        assert not any(min(values) < t < max(values) for t in legal)


def test_pipeline_needs_a_layer_a_stage(make_run):
    run = make_run(parallel={"pipeline": 5})
    assert refusal(run, world_size=5, kind=TopologyError) == (
        "parallel.pipeline=5 is more than num_layers=4, and each stage needs a layer; nearest: 4"
    )
    assert check_run(make_run(parallel={"pipeline": 4}), SHAPE, ZERO_1, 4, "cpu") == 1


def test_world_size(make_run):
    run = make_run(parallel={"tensor": 2, "pipeline": 2})
    assert refusal(run, world_size=6, kind=TopologyError) == (
        "parallel.tensor=2 * parallel.pipeline=2 = 4 does not divide the number of ranks 6; nearest: 4 or 8 ranks; "
        "or, with 6, parallel.tensor=1, or parallel.pipeline=1 or 3"
    )
    assert refusal(run, world_size=1).endswith("nearest: 4 ranks")
    assert refusal(run, world_size=3).endswith("the number of ranks 3; nearest: 4 ranks")


def test_proposed_worlds_and_degrees_pass(make_run):
    tried = 0
    for tensor, pipeline, world in itertools.product([1, 2, 4, 8], [1, 2, 3, 4], range(1, 18)):

        def accepted(tensor, pipeline, world):
            run = make_run(parallel={"tensor": tensor, "pipeline": pipeline}, train={"global_batch_size": 720720 * 17})
            return check_run(run, SHAPE, ZERO_1, world, "cpu") == world // (tensor * pipeline)

        if world % (tensor * pipeline) == 0:
            assert accepted(tensor, pipeline, world)
            continue
        run = make_run(parallel={"tensor": tensor, "pipeline": pipeline})
        message = refusal(run, world_size=world, kind=TopologyError)
        worlds, _, degrees = message.partition("; nearest: ")[2].partition("; or, with ")
        for value in proposed(worlds, after="^"):
            assert accepted(tensor, pipeline, value)
            tried += 1
        if "parallel.tensor=" in degrees:
            for value in proposed(degrees, after="parallel.tensor="):
                assert accepted(value, pipeline, world)
                tried += 1
        if "parallel.pipeline=" in degrees:
            for value in proposed(degrees, after="parallel.pipeline="):
                assert accepted(tensor, value, world)
                tried += 1
    assert tried > 100


def test_global_batch(make_run):
    run = make_run(train={"global_batch_size": 10, "micro_batch_size": 4})
    assert refusal(run, world_size=2, kind=TopologyError) == (
        "train.global_batch_size=10 is not divisible by train.micro_batch_size=4 * 2 data ranks = 8; nearest: 8 or 16"
    )
    assert refusal(make_run(train={"global_batch_size": 3}), world_size=4).endswith("; nearest: 4")


def test_proposed_batches_pass(make_run):
    refused = 0
    for batch, micro, world in itertools.product(range(1, 26), [1, 2, 3, 4], [1, 2, 3, 4]):
        run = make_run(train={"global_batch_size": batch, "micro_batch_size": micro})
        if batch % (micro * world) == 0:
            assert check_run(run, SHAPE, ZERO_1, world, "cpu") == world
            continue
        values = proposed(refusal(run, world_size=world, kind=TopologyError))
        for value in values:
            fixed = make_run(train={"global_batch_size": value, "micro_batch_size": micro})
            assert check_run(fixed, SHAPE, ZERO_1, world, "cpu") == world
        assert min(abs(value - batch) for value in values) < micro * world
        refused += 1
    assert refused > 100


def test_sequence_parallel_length(make_run):
    run = make_run(parallel={"tensor": 4, "sequence": True}, data={"seq_length": 513})
    assert refusal(run, world_size=4, kind=TopologyError) == (
        "data.seq_length=513 is not divisible by parallel.tensor=4, which parallel.sequence=true needs; "
        "nearest: 512 or 516"
    )
    learned = replace(SHAPE, max_positions=514)
    assert refusal(run, learned, world_size=4).endswith("nearest: 512")
    short = make_run(parallel={"tensor": 4, "sequence": True}, data={"seq_length": 3})
    assert refusal(short, replace(SHAPE, max_positions=3), world_size=4).endswith("try parallel.sequence=false")
    for value in (512, 516):
        run = make_run(parallel={"tensor": 4, "sequence": True}, data={"seq_length": value})
        assert check_run(run, SHAPE, ZERO_1, 4, "cpu") == 1


def test_sequence_without_tensor_has_no_effect(make_run):
    run = make_run(parallel={"sequence": True}, data={"seq_length": 513})
    assert check_run(run, SHAPE, ZERO_1, 1, "cpu") == 1
    run = make_run(parallel={"tensor": 2}, data={"seq_length": 513})
    assert check_run(run, SHAPE, ZERO_1, 2, "cpu") == 1


def test_shared_memory(make_run):
    run = make_run(parallel={"tensor": 2, "shared_memory": True})
    assert check_run(run, SHAPE, ZERO_1, 2, "cpu") == 1
    assert check_run(make_run(parallel={"shared_memory": True}), SHAPE, ZERO_1, 2, "cuda") == 2  # without effect
    assert refusal(run, world_size=2, device_type="cuda") == (
        "parallel.shared_memory=true is for ranks on CPUs, and they are on cuda; try false"
    )
    words = "parallel.shared_memory=true needs all 4 ranks to be one tensor group, and parallel.tensor=2; try "
    assert refusal(run, world_size=4) == f"{words}false, or 2 ranks"
    run = make_run(parallel={"tensor": 2, "pipeline": 2, "shared_memory": True})
    assert refusal(run, world_size=4) == f"{words}false, or 2 ranks and parallel.pipeline=1"
    run = make_run(parallel={"tensor": 2, "sequence": True, "shared_memory": True})
    assert "parallel.sequence=true gathers and scatters instead" in refusal(run, world_size=2)


def test_learned_positions(make_run):
    learned = replace(SHAPE, max_positions=1024)
    assert refusal(make_run(data={"seq_length": 2048}), learned) == (
        "data.seq_length=2048 is more than the model's 1024 learned positions; nearest: 1024"
    )
    assert check_run(make_run(data={"seq_length": 1024}), learned, ZERO_1, 1, "cpu") == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_pipeline_needs_zero_1(make_run, stage):
    run = make_run(parallel={"pipeline": 2})
    assert refusal(run, facts=replace(ZERO_1, zero_stage=stage), world_size=2) == (
        f"zero_optimization.stage={stage} in the DeepSpeed JSON cannot run with parallel.pipeline=2: DeepSpeed's "
        "pipeline engine keeps full gradients across micro-batches; try stage 1, or parallel.pipeline=1"
    )


@pytest.mark.parametrize(
    ("parallel", "precision", "place"),
    [
        ({"pipeline": 2}, "fp32", "parallel.pipeline=2"),
        ({}, "bf16", "bf16.enabled=true"),
        ({}, "fp16", "fp16.enabled=true"),
    ],
)
def test_zero_0_without_a_pipeline_in_fp32(make_run, parallel, precision, place):
    facts = DeepSpeedSummary(0, precision, False, False)
    assert refusal(make_run(parallel=parallel), facts=facts, world_size=2, device_type="cuda") == (
        f"zero_optimization.stage=0 in the DeepSpeed JSON cannot run with {place}: DeepSpeed's gradient norm, "
        "and so its clipping, is wrong there; nearest: stage 1 (0 is DeepSpeed's default where no stage is given)"
    )
    for tensor in (1, 2):
        run = make_run(parallel={"tensor": tensor})
        assert check_run(run, SHAPE, DeepSpeedSummary(0, "fp32", False, False), 2, "cpu") == 2 // tensor


def test_fp16_on_cpu(make_run):
    facts = replace(ZERO_1, precision="fp16")
    assert refusal(make_run(), facts=facts) == (
        "fp16.enabled=true in the DeepSpeed JSON cannot run on cpu, where DeepSpeed has no fp16; nearest: bf16"
    )
    assert check_run(make_run(), SHAPE, facts, 1, "cuda") == 1
    assert check_run(make_run(), SHAPE, replace(ZERO_1, precision="bf16"), 1, "cpu") == 1


def test_offload(make_run):
    param = DeepSpeedSummary(2, "bf16", False, True)
    assert refusal(make_run(), facts=param) == (
        "zero_optimization.offload_param needs stage 3, but zero_optimization.stage=2 in the DeepSpeed JSON; "
        "try stage 3, or remove it"
    )
    piped = make_run(parallel={"pipeline": 2})
    for stage in (1, 3):
        assert refusal(piped, facts=replace(param, zero_stage=stage), world_size=2) == (
            "zero_optimization.offload_param in the DeepSpeed JSON cannot run with parallel.pipeline=2: it needs "
            "stage 3, which DeepSpeed's pipeline engine does not support; try stage 1 without offload_param, "
            "or parallel.pipeline=1"
        )
    optimizer = DeepSpeedSummary(0, "fp32", True, False)
    assert refusal(make_run(), facts=optimizer) == (
        "zero_optimization.offload_optimizer needs stage 1, 2 or 3, but zero_optimization.stage=0 in the DeepSpeed "
        "JSON; nearest: stage 1"
    )
    assert check_run(make_run(), SHAPE, replace(param, zero_stage=3), 1, "cpu") == 1


@pytest.mark.parametrize("name", ["tensor", "expert"])
def test_second_shards_need_data_ranks_alone(make_run, name):
    """With 2 tensor and 2 data ranks the first loss was 5.02 instead of 4.91."""
    zero_3 = replace(ZERO_1, zero_stage=3, hpz_partition_size=2)
    assert refusal(make_run(parallel={name: 2}), facts=zero_3, world_size=4) == (
        f"zero_optimization.zero_hpz_partition_size=2 in the DeepSpeed JSON cannot run with parallel.{name}=2: "
        "DeepSpeed would gather a parameter from consecutive ranks, which hold different parts of the model; nearest: 1"
    )
    for runs in ({"hpz_partition_size": 1}, {"zero_stage": 2}):
        check_run(make_run(parallel={name: 2}), SHAPE, replace(zero_3, **runs), 4, "cpu")
    assert check_run(make_run(), SHAPE, zero_3, 2, "cpu") == 2


def test_the_size_of_second_shards_is_read_from_the_json():
    mapping = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}}
    assert summarize_deepspeed(mapping).hpz_partition_size == 4


def test_every_legal_stage_and_layout_passes(make_run):
    for stage, precision, tensor, pipeline in itertools.product(range(4), ("fp32", "bf16"), (1, 2), (1, 2)):
        run = make_run(parallel={"tensor": tensor, "pipeline": pipeline})
        facts = DeepSpeedSummary(stage, precision, False, False)
        plain = pipeline == 1 and precision == "fp32"
        if (stage == 0 and not plain) or (stage >= 2 and pipeline > 1):
            refusal(run, facts=facts, world_size=4)
        else:
            assert check_run(run, SHAPE, facts, 4, "cpu") == 4 // (tensor * pipeline)


def test_nearest():
    assert nearest(3, [1, 2, 4, 8]) == [2, 4]
    assert nearest(4, [1, 2, 4, 8]) == [4]
    assert nearest(9, [1, 2]) == [2]
    assert nearest(1, [2, 3]) == [2]
    assert nearest(1, []) == []
