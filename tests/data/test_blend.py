"""Blends: the last bits of weights that decide ties in Megatron, sizes asked for, and corpora kept apart."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data import Causal, Order, open_dataset
from megatron_ds.data.blend import Blend, ConcatDataset, OrderedDataset, normalized, samples_per_source
from megatron_ds.data.dataset import Sample
from megatron_ds.errors import DataError
from tests.data import oracle

VOCAB_SIZE = 100
# Made to add up to 1 twice, as Megatron does, these blend otherwise than made to once, from sample 4, 10 and 22 on.
WEIGHTS_WITH_TIES = [[1.0, 5.0, 10.0, 7.0, 1.0], [10.0, 6.0, 5.0, 4.0, 5.0], [4.0, 8.0, 7.0, 3.0]]


class Numbers:
    """A dataset whose sample is its number and epoch."""

    seq_length, target_length, ordered, fingerprint = 2, None, False, "numbers"

    def __init__(self, size: int, columns: tuple[str, ...] = ("input_ids", "targets")) -> None:
        self._size, self.columns = size, columns

    def __len__(self) -> int:
        return self._size

    def sample(self, index: int) -> Sample:
        epoch, number = divmod(index, self._size)
        return dict.fromkeys(self.columns, np.array([epoch, number]))

    def blank(self) -> Sample:
        return self.sample(0)

    def describe(self) -> str:
        return f"{self._size} numbers"


def numbers(dataset: OrderedDataset, epoch: int) -> list[int]:
    found = [dataset.sample(epoch * len(dataset) + place)["input_ids"].tolist() for place in range(len(dataset))]
    assert {one[0] for one in found} == {epoch}
    return [one[1] for one in found]


@pytest.mark.parametrize("weights", WEIGHTS_WITH_TIES, ids=str)
def test_ties_fall_as_in_megatron(weights: list[float], tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    prefixes = [tmp_path / f"corpus.{number}" for number in range(len(weights))]
    for number, prefix in enumerate(prefixes):
        documents = [[chance.integers(0, 90, size=size)] for size in chance.integers(1, 40, size=30 + number)]
        oracle.write(prefix, documents, np.uint16)
    (theirs, _, _) = oracle.datasets(prefixes, weights, "1", (120, 0, 0), 8, 5)
    ours = open_dataset(
        "indexed",
        Causal(),
        [str(prefix) for prefix in prefixes],
        8,
        VOCAB_SIZE,
        None,
        str(tmp_path / "cache"),
        weights=weights,
        order=Order(120, 5, True),
    )
    for index in range(120):
        assert ours.sample(index)["input_ids"].tolist() == theirs[index]["tokens"].tolist(), index


def test_as_many_samples_are_asked_for_as_in_megatron() -> None:
    from megatron.core.datasets.blended_megatron_dataset_builder import _get_size_per_split_per_dataset

    chance = np.random.default_rng(0)
    for num_samples in (1, 7, 400, 12_345, 10**9):
        weights = normalized(chance.random(5))
        theirs = _get_size_per_split_per_dataset(weights, [num_samples], surplus=0.005)
        assert samples_per_source(weights, num_samples) == [size for (size,) in theirs]


def test_corpora_of_one_blend_have_permutations_of_their_own() -> None:
    order = Order(100, 3, True)
    first, second = (OrderedDataset(Numbers(50), order, number) for number in (0, 1))
    seen = [numbers(dataset, epoch) for dataset in (first, second) for epoch in (0, 1, 7)]
    assert all(sorted(one) == list(range(50)) for one in seen)
    assert len({str(one) for one in seen}) == len(seen)
    assert numbers(first, 0) == seen[0], "whatever was read between"
    assert numbers(OrderedDataset(Numbers(50), Order(9, 3, True), 0), 0) == seen[0], "however many a run takes"
    assert numbers(OrderedDataset(Numbers(50), Order(100, 3, False), 1), 1) == list(range(50))


def test_columns_must_agree(tmp_path: Path) -> None:
    parts = [Numbers(5), Numbers(5, ("input_ids", "targets", "position_ids"))]
    with pytest.raises(DataError, match="a has input_ids, targets, b has input_ids, targets, position_ids; a blend"):
        Blend(parts, ["a", "b"], [1.0, 1.0], 10, tmp_path)
    with pytest.raises(DataError, match="b has input_ids, targets, position_ids"):
        ConcatDataset(parts, ["a", "b"])


def test_a_longer_blend_begins_as_a_shorter_one(tmp_path: Path) -> None:
    parts = [Numbers(40), Numbers(9), Numbers(3)]
    shorter, longer = (Blend(parts, ["a", "b", "c"], [5.0, 2.0, 1.0], size, tmp_path) for size in (60, 500))
    assert shorter.fingerprint == longer.fingerprint
    for index in range(60):
        assert shorter.sample(index)["input_ids"].tolist() == longer.sample(index)["input_ids"].tolist()
    assert [share.samples for share in longer.usage(60)] == [share.samples for share in shorter.usage(60)]
    assert sum(share.samples for share in shorter.usage(150)) == 150
