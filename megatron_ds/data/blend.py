"""Several datasets as one: in shares given by weights, or one after the other.

Blends follow Megatron: sample i is of the dataset that is furthest behind its share, argmax of w_d max(i, 1) - n_d with
n_d the samples it has given so far; the first of equals is taken. So the first samples of a longer blend are those of a
shorter one.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ds.data.dataset import Dataset, Sample
from megatron_ds.data.indexed.dataset import IndexedDataset
from megatron_ds.data.noise.seeded_random import Draws
from megatron_ds.data.options import Order
from megatron_ds.data.readers.array_cache import cached_arrays
from megatron_ds.data.readers.concat_index import Concatenation
from megatron_ds.errors import DataError

SURPLUS = 0.005
"""Each dataset is asked for so much more than its share, as Megatron does: shares are not met to the sample."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Share:
    """What a run has taken of one corpus.

    Attributes:
        name: the source.
        weight: its share of the blend, 1 where there is no other.
        samples: taken so far.
        epochs: how often that is all of it.
    """

    name: str
    weight: float
    samples: int
    epochs: float


class Ordered:
    """A dataset in the order in which a run takes it: each epoch has a permutation of its own.

    Args:
        dataset: one that has no order.
        order: of the run.
        number: of the dataset among those of a blend, so that no two have the same permutations.
    """

    ordered = True

    def __init__(self, dataset: Dataset, order: Order, number: int) -> None:
        self._dataset, self._order, self._number = dataset, order, number
        self._known = -1, np.empty(0, dtype=np.int64)  # an epoch and its permutation: one name, as threads read it
        self.seq_length, self.target_length = dataset.seq_length, dataset.target_length
        self.columns, self.fingerprint = dataset.columns, dataset.fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def sample(self, index: int) -> Sample:
        """What the run takes as number `index`, in any epoch."""
        epoch, place = divmod(index, len(self))
        at = int(self._permutation_of(epoch)[place]) if self._order.shuffle else place
        return self._dataset.sample(epoch * len(self) + at)

    def blank(self) -> Sample:
        """As the dataset's."""
        return self._dataset.blank()

    def describe(self) -> str:
        """As the dataset's."""
        return self._dataset.describe()

    def _permutation_of(self, epoch: int) -> np.ndarray:
        known = self._known
        if known[0] != epoch:
            known = self._known = epoch, Draws(self._order.seed, epoch, self._number).order(len(self))
        return known[1]


class Blend:
    """Datasets in shares; sample i of a run is of the one that `blend_order` says.

    Args:
        datasets: each in its own order.
        names: of their sources.
        weights: one each, more than 0; their sum does not matter.
        num_samples: of the run.
        cache_dir: where the order is kept.

    Raises:
        DataError: their samples do not have the same columns.
    """

    ordered = True

    def __init__(
        self,
        datasets: Sequence[Dataset],
        names: Sequence[str],
        weights: Sequence[float],
        num_samples: int,
        cache_dir: Path,
    ) -> None:
        first = datasets[0]
        require_alike(datasets, names)
        self._datasets, self._names = list(datasets), list(names)
        self.weights = normalized(weights)
        self.seq_length, self.target_length, self.columns = first.seq_length, first.target_length, first.columns
        key = hashlib.sha256(repr((FORMAT_VERSION, self.weights, num_samples)).encode()).hexdigest()

        def make() -> dict[str, np.ndarray]:
            # in Megatron, shares are made to add up to 1 twice; what that does to their last bits decides ties
            source, place = blend_order(normalized(self.weights), num_samples)
            return {"source": source, "place": place}

        self._order = cached_arrays(cache_dir, f"{key}.blend", ("source", "place"), make)
        content = ["blend", *(f"{one.fingerprint} {weight!r}" for one, weight in zip(datasets, self.weights))]
        self.fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._order["source"])

    def sample(self, index: int) -> Sample:
        """Number `index % len` of the run."""
        at = index % len(self)
        return self._datasets[int(self._order["source"][at])].sample(int(self._order["place"][at]))

    def blank(self) -> Sample:
        """As the first dataset's."""
        return self._datasets[0].blank()

    def describe(self) -> str:
        """Such as `blend of 0.700 a (1.2 B tokens, ...) and 0.300 b (...)`."""
        parts = zip(self.weights, self._names, self._datasets)
        return "blend of " + " and ".join(f"{weight:.3f} {name} ({one.describe()})" for weight, name, one in parts)

    def account(self, num_samples: int) -> tuple[Share, ...]:
        """What the first samples of the run are of."""
        whole, rest = divmod(num_samples, len(self))
        source = self._order["source"]
        taken = np.bincount(source[:rest], minlength=len(self._datasets))
        if whole:
            taken = taken + whole * np.bincount(source, minlength=len(self._datasets))
        return tuple(
            Share(name, weight, int(samples), int(samples) / _epoch_samples(one))
            for name, weight, samples, one in zip(self._names, self.weights, taken, self._datasets)
        )


class InSuccession:
    """Datasets one after the other, each in its own order: for validation.

    Args:
        datasets: at least one.
        names: of their sources.

    Raises:
        DataError: their samples do not have the same columns.
    """

    ordered = True

    def __init__(self, datasets: Sequence[Dataset], names: Sequence[str]) -> None:
        first = datasets[0]
        require_alike(datasets, names)
        self._datasets, self._whole = list(datasets), Concatenation([len(one) for one in datasets])
        self.seq_length, self.target_length, self.columns = first.seq_length, first.target_length, first.columns
        content = ["succession", *(one.fingerprint for one in datasets)]
        self.fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._whole)

    def sample(self, index: int) -> Sample:
        """Number `index % len`."""
        part, offset = self._whole.locate(index % len(self))
        return self._datasets[part].sample(offset)

    def blank(self) -> Sample:
        """As the first dataset's."""
        return self._datasets[0].blank()

    def describe(self) -> str:
        """Each dataset's."""
        return "; ".join(one.describe() for one in self._datasets)


def account(dataset: Dataset, num_samples: int) -> tuple[Share, ...]:
    """What a run has taken of each corpus; nothing for data that keep no account.

    Args:
        dataset: of the run.
        num_samples: taken so far.
    """
    if isinstance(dataset, Blend):
        return dataset.account(num_samples)
    if isinstance(dataset, IndexedDataset):
        return (Share(dataset.name, 1.0, num_samples, num_samples / dataset.num_epoch_samples),)
    return ()


def normalized(weights: Sequence[float]) -> list[float]:
    """The same shares, adding up to 1."""
    whole = np.asarray(weights, dtype=np.float64)
    return (whole / whole.sum()).tolist()


def samples_of_each(weights: Sequence[float], num_samples: int) -> list[int]:
    """How many samples each dataset of a blend is asked for."""
    return [math.ceil(math.ceil(num_samples * weight) * (1 + SURPLUS)) for weight in normalized(weights)]


def blend_order(weights: Sequence[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Which dataset each sample is of, (n,) int16, and which of its samples it is, (n,) int64.

    Each depends on all before it, so it is a plain loop; about 1 us a sample and dataset.
    """
    count = len(weights)
    source = bytearray(2 * num_samples)
    view = memoryview(source).cast("h")
    taken, rest = [0.0] * count, range(1, count)
    for index in range(num_samples):
        step = float(index) if index else 1.0
        best, most = 0, weights[0] * step - taken[0]
        for one in rest:
            behind = weights[one] * step - taken[one]
            if behind > most:
                best, most = one, behind
        view[index] = best
        taken[best] += 1.0
    sources = np.frombuffer(source, dtype=np.int16)
    places = np.empty(num_samples, dtype=np.int64)
    for one in range(count):
        mine = np.flatnonzero(sources == one)
        places[mine] = np.arange(len(mine))
    return sources, places


def require_alike(datasets: Sequence[Dataset], names: Sequence[str]) -> None:
    """Refuses datasets that a batch cannot be made of.

    Raises:
        DataError: naming the two.
    """
    first = datasets[0]
    for name, one in zip(names, datasets):
        if (one.columns, one.target_length) != (first.columns, first.target_length):
            raise DataError(
                f"data: {names[0]} has {', '.join(first.columns)}, {name} has {', '.join(one.columns)}; a blend needs "
                "the same columns throughout"
            )


def _epoch_samples(dataset: Dataset) -> int:
    return dataset.num_epoch_samples if isinstance(dataset, IndexedDataset) else len(dataset)
