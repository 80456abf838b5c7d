"""What every dataset that draws noise is held to, and bounds on how often things happen."""

import multiprocessing
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from megatron_ds.data import Dataset, Sample


def assert_equal_samples(first: Sample, second: Sample) -> None:
    assert set(first) == set(second)
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        np.testing.assert_array_equal(array, second[name], err_msg=name)


def differ(first: Sample, second: Sample) -> bool:
    return any(not np.array_equal(array, second[name]) for name, array in first.items())


def assert_noise_depends_on_the_index_alone(open_again: Callable[[], Dataset]) -> None:
    """Not on order, on what was asked before, on the dataset object or on the process; and epochs differ."""
    dataset = open_again()
    size = len(dataset)
    indices = [0, 1, size - 1, size, 2 * size + 1, 10**12]
    expected = [dataset.sample(index) for index in indices]
    other = open_again()
    assert other.fingerprint == dataset.fingerprint
    for index, sample in reversed(list(zip(indices, expected))):
        assert_equal_samples(other.sample(index), sample)
        assert_equal_samples(dataset.sample(index), sample)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        for sample, told in zip(expected, pool.apply_async(_samples, (other, indices)).get(60)):
            assert_equal_samples(told, sample)
    assert differ(dataset.sample(0), dataset.sample(size))


def _samples(dataset: Dataset, indices: Sequence[int]) -> list[Sample]:
    return [dict(dataset.sample(index)) for index in indices]


def assert_shapes(dataset: Dataset, samples: Sequence[Sample]) -> None:
    """Names, shapes and types are the contract's; the blank sample has the same, and no loss."""
    length, target_length = dataset.seq_length, dataset.target_length or dataset.seq_length
    for sample in (*samples, dataset.blank()):
        assert tuple(sample) == dataset.columns or set(sample) == set(dataset.columns)
        for name, array in sample.items():
            assert array.dtype == (bool if name.endswith("attention_mask") else np.int64), name
            decoder = name.startswith("decoder_") or name == "targets"
            shape = () if name == "next_sentence_label" else (target_length if decoder else length,)
            assert array.shape == shape, name
    blank = dataset.blank()
    assert (blank["targets"] == -100).all()
    assert blank.get("next_sentence_label", -100) == -100
    assert all(blank[name].all() for name in blank if name.endswith("attention_mask"))


def assert_share(successes: int, trials: int, share: float) -> None:
    """`successes` of independent `trials` lie within 5 standard deviations of `share`: one false alarm in 10**6."""
    deviation = np.sqrt(share * (1 - share) / trials)
    assert successes / trials == pytest.approx(share, abs=5 * deviation), f"{successes} of {trials}"
