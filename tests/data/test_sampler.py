"""The order of samples: a function of the seed and the step alone, and every sample of a step on exactly one rank."""

import re

import numpy as np
import pytest

from megatron_ds.data import NO_SAMPLE, GlobalBatches, for_data_rank, ordered_pass
from megatron_ds.errors import ConfigError, TopologyError

LAYOUTS = [
    (size, micro, accumulation) for size in (1, 2, 3, 4, 6) for micro in (1, 2, 4) for accumulation in (1, 2, 3, 5)
]


def test_unshuffled_batches_follow_the_file_and_go_on_into_the_next_epoch():
    batches = GlobalBatches(num_samples=10, global_batch_size=4, seed=1, shuffle=False)
    assert [batches.indices(step).tolist() for step in range(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]


@pytest.mark.parametrize("num_samples", [1, 5, 37])
def test_every_shuffled_epoch_holds_every_sample_once_and_differs(num_samples):
    batches = GlobalBatches(num_samples, global_batch_size=8, seed=7, shuffle=True)
    stream = np.concatenate([batches.indices(step) for step in range(num_samples)])  # 8 whole epochs
    epochs = stream.reshape(8, num_samples)
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(number * num_samples, (number + 1) * num_samples))
    if num_samples == 37:
        assert len({tuple(epoch % num_samples) for epoch in epochs}) == 8
        assert tuple(epochs[0]) != tuple(range(37))


def test_shuffled_order_depends_on_seed_and_step_not_on_what_was_asked_before():
    in_order = GlobalBatches(23, 6, seed=3, shuffle=True)
    expected = [in_order.indices(step) for step in range(20)]
    for step in reversed(range(20)):
        resumed = GlobalBatches(23, 6, seed=3, shuffle=True)
        np.testing.assert_array_equal(resumed.indices(step), expected[step])
        np.testing.assert_array_equal(in_order.indices(step), expected[step])
    assert not np.array_equal(GlobalBatches(23, 6, seed=4, shuffle=True).indices(0), expected[0])


def test_shuffled_order_is_the_same_for_any_batch_size():
    small, large = (GlobalBatches(23, size, seed=3, shuffle=True) for size in (2, 12))
    stream = np.concatenate([small.indices(step) for step in range(12)])
    np.testing.assert_array_equal(stream, np.concatenate([large.indices(step) for step in range(2)]))


def test_shuffled_order_never_changes_between_versions():
    """Written down once: another order would silently change every resumed run."""
    batches = GlobalBatches(10, 10, seed=1234, shuffle=True)
    assert batches.indices(0).tolist() == [6, 9, 1, 8, 0, 4, 5, 7, 2, 3]
    assert batches.indices(1).tolist() == [13, 16, 18, 12, 11, 15, 14, 19, 10, 17]


@pytest.mark.parametrize(("data_size", "micro_batch_size", "accumulation"), LAYOUTS)
def test_ranks_and_micro_batches_partition_the_global_batch(data_size, micro_batch_size, accumulation):
    batch = GlobalBatches(1000, data_size * micro_batch_size * accumulation, seed=5, shuffle=True).indices(3)
    ranks = [for_data_rank(batch, rank, data_size, micro_batch_size) for rank in range(data_size)]
    for micro_batches in ranks:
        assert [len(micro) for micro in micro_batches] == [micro_batch_size] * accumulation
    run_on_all_ranks = [ranks[rank][m] for m in range(accumulation) for rank in range(data_size)]
    np.testing.assert_array_equal(np.concatenate(run_on_all_ranks), batch)


@pytest.mark.parametrize(
    ("batch", "data_size", "micro", "nearest"), [(10, 2, 2, "8 or 12"), (3, 2, 2, "4"), (0, 1, 1, "1")]
)
def test_indivisible_batch_is_refused_with_the_nearest_that_fits(batch, data_size, micro, nearest):
    expected = f"train.global_batch_size={batch} is not a multiple .* = {data_size} x {micro} = .*; nearest: {nearest}$"
    with pytest.raises(TopologyError, match=expected):
        for_data_rank(np.arange(batch), 0, data_size, micro)


def test_negative_seed_is_refused():
    with pytest.raises(ConfigError, match=re.escape("train.seed=-1 must not be negative; nearest: 0")):
        GlobalBatches(10, 2, seed=-1, shuffle=False)


@pytest.mark.parametrize(("num_samples", "size", "num_batches"), [(10, 4, 3), (8, 4, 2), (1, 4, 1)])
def test_validation_pass_holds_every_sample_once_and_fills_the_last_batch(num_samples, size, num_batches):
    batches = list(ordered_pass(num_samples, size))
    assert [len(batch) for batch in batches] == [size] * num_batches
    stream = np.concatenate(batches)
    np.testing.assert_array_equal(stream[:num_samples], np.arange(num_samples))
    assert (stream[num_samples:] == NO_SAMPLE).all()
