"""`train.batch_ramp`: sizes of all steps are Megatron-LM's, and counts of samples are sums over steps."""

from itertools import accumulate

import pytest

from megatron_ds.config import DeepSpeedSummary, ModelShape, check_run, load_run
from megatron_ds.config.batch_ramp import BatchRamp, batch_sizes
from megatron_ds.errors import ConfigError, TopologyError

SHAPE = ModelShape(num_layers=4, num_attention_heads=8, ffn_size=64, hidden_size=32, vocab_size=101, max_positions=None)
RAMPS = [(64, 8, 8, 1000), (64, 16, 48, 1), (64, 32, 4, 333), (512, 16, 16, 100_000), (12, 4, 4, 16), (9, 1, 1, 7)]


def by_samples(size: int, start: int, increment: int, samples: int, steps: int) -> list[int]:
    """The rule as Megatron-LM states it, in the samples that were consumed."""
    consumed, found = 0, []
    for _ in range(steps):
        each = samples / ((size - start) // increment)
        found.append(size if consumed > samples else min(size, start + int(consumed / each) * increment))
        consumed += found[-1]
    return found


@pytest.mark.parametrize(("size", "start", "increment", "samples"), RAMPS)
def test_sizes_and_sums(size: int, start: int, increment: int, samples: int) -> None:
    sizes = batch_sizes(size, BatchRamp(start=start, increment=increment, samples=samples))
    expected = by_samples(size, start, increment, samples, 1000)
    assert [sizes.at(step) for step in range(1, 1001)] == expected
    before = [0, *accumulate(expected)]
    assert [sizes.samples_before(step) for step in range(1, 1001)] == before[:-1]
    assert not sizes.are_equal
    for steps in (1, 2, 3, 10, 57, 999):
        assert sizes.steps_for(before[steps]) == steps
        assert sizes.steps_for(before[steps] + 1) == steps + 1


def test_without_a_ramp_all_steps_are_equal() -> None:
    sizes = batch_sizes(8, None)
    assert sizes.are_equal
    assert (sizes.at(5), sizes.samples_before(5), sizes.steps_for(33)) == (8, 32, 5)


def test_the_samples_of_a_run_and_the_steps_of_epochs(make_run) -> None:
    ramp = {"start": 4, "increment": 4, "samples": 16}
    train = {"global_batch_size": 12, "micro_batch_size": 2, "batch_ramp": ramp}
    run = make_run(train={**train, "steps": 5})
    assert run.train.num_samples == 4 + 4 + 8 + 12 + 12
    counted = make_run(train={**train, "steps": None, "epochs": 2}).with_steps(20)
    assert counted.train.num_steps == 5
    assert make_run(train={**train, "steps": None, "epochs": 0.5}).with_steps(15).train.num_steps == 2


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["train.batch_ramp={start: 64, increment: 8, samples: 100}"],
            "train.batch_ramp.start=64 is not less than train.global_batch_size=64, to which the batch grows; try a "
            "smaller one, or no train.batch_ramp",
        ),
        (
            ["train.batch_ramp={start: 16, increment: 7, samples: 100}"],
            "train.batch_ramp.increment=7 does not divide train.global_batch_size - train.batch_ramp.start = 48; "
            "nearest: 6 or 8",
        ),
        (
            ["train.batch_ramp={start: 16, increment: 50, samples: 100}"],
            "train.batch_ramp.increment=50 does not divide train.global_batch_size - train.batch_ramp.start = 48; "
            "nearest: 48",
        ),
        (
            ["train.batch_ramp=[16, 16, 100]"],
            "train.batch_ramp=[16, 16, 100] is not a mapping; write train: {batch_ramp: {start: 32, increment: 32, "
            "samples: 100000}}",
        ),
        (
            ["train.rampup_batch_size=[16, 8, 100]"],
            "train.rampup_batch_size: unknown key; write train.batch_ramp: {start: 32, increment: 32, samples: 100000}",
        ),
    ],
)
def test_refused(run_file, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(run_file(), ["train.global_batch_size=64", *overrides])
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("ramp", "says"),
    [
        (
            {"start": 12, "increment": 52, "samples": 9},
            "train.batch_ramp.start=12 is not divisible by train.micro_batch_size=4 * 2 data ranks = 8; nearest: 8 or "
            "16",
        ),
        (
            {"start": 16, "increment": 12, "samples": 9},
            "train.batch_ramp.increment=12 is not divisible by train.micro_batch_size=4 * 2 data ranks = 8; nearest: 8 "
            "or 16",
        ),
    ],
)
def test_batches_that_data_ranks_cannot_share(make_run, ramp: dict[str, int], says: str) -> None:
    run = make_run(train={"global_batch_size": 64, "micro_batch_size": 4, "batch_ramp": ramp})
    with pytest.raises(TopologyError) as caught:
        check_run(run, SHAPE, DeepSpeedSummary(1, "fp32", False, False), 2, "cpu")
    assert str(caught.value) == says
