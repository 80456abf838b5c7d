"""Several datasets as one: mixed in proportion to weights, or concatenated.

In each phase of its mixture a blend follows Megatron: sample i is taken from the dataset that is furthest behind its
weight, argmax of w_d max(i, 1) - n_d with n_d the samples taken from it so far; ties go to the first. So the first
samples of a longer blend are those of a shorter one.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from megatron_ds.data.dataset import Dataset, Sample
from megatron_ds.data.mixture import Mixture, Phase, Weights
from megatron_ds.data.noise.seeded_random import SeededRandom
from megatron_ds.data.readers.array_cache import cached_arrays
from megatron_ds.data.readers.bad_rows import BadRows, total_bad_rows
from megatron_ds.data.readers.concat_index import ConcatIndex
from megatron_ds.data.request import DatasetRequest, Order
from megatron_ds.errors import DataError

SURPLUS = 0.005
"""Extra fraction of samples requested from each dataset, as in Megatron: the counts of a blend are not exact."""
FORMAT_VERSION = 1
_ARRAYS = {"source": "i2 1", "place": "i8 1"}


@dataclass(frozen=True)
class SourceUsage:
    """Samples that a run has taken from one source; an entry of `data.json`.

    Attributes:
        name: the source.
        weight: its fraction of the blend, 1 where it is the only one.
        samples: taken so far.
        epochs: the same as a multiple of the source's samples.
    """

    name: str
    weight: float
    samples: int
    epochs: float


@runtime_checkable
class UsageAccount(Protocol):
    """A dataset that can tell from which sources a run's samples came."""

    def usage(self, num_samples: int) -> tuple[SourceUsage, ...]:
        """Return the usage of each source after the first `num_samples` samples of the run."""


@runtime_checkable
class Repeated(Protocol):
    """A dataset whose `len` covers several epochs of its source."""

    @property
    def num_epoch_samples(self) -> int:
        """Number of samples of one epoch."""


class OrderedDataset:
    """A dataset in the order of a run: each epoch has its own permutation.

    Args:
        dataset: a dataset that is not ordered.
        order: of the run.
        number: index of the dataset in a blend, so that no two have the same permutations.
    """

    ordered = True

    def __init__(self, dataset: Dataset, order: Order, number: int) -> None:
        self._dataset, self._order, self._number = dataset, order, number
        self._cached = -1, np.empty(0, dtype=np.int64)  # (epoch, permutation) in one attribute: threads read it
        self.seq_length, self.target_length = dataset.seq_length, dataset.target_length
        self.columns, self.fingerprint = dataset.columns, dataset.fingerprint

    @property
    def parts(self) -> Sequence[tuple[str, Dataset]]:
        """The dataset itself, in its own order."""
        return [("", self._dataset)]

    def __len__(self) -> int:
        return len(self._dataset)

    def sample(self, index: int) -> Sample:
        """Return sample number `index` of the run, in any epoch."""
        epoch, place = divmod(index, len(self))
        offset = int(self._permutation(epoch)[place]) if self._order.shuffle else place
        return self._dataset.sample(epoch * len(self) + offset)

    def blank(self) -> Sample:
        """Return the dataset's blank sample."""
        return self._dataset.blank()

    @property
    def bad_rows(self) -> BadRows:
        """Account of the rows that were left out."""
        return total_bad_rows([self._dataset])

    def describe(self) -> str:
        """Return the dataset's description."""
        return self._dataset.describe()

    def _permutation(self, epoch: int) -> np.ndarray:
        cached = self._cached
        if cached[0] != epoch:
            cached = self._cached = epoch, SeededRandom(self._order.seed, epoch, self._number).order(len(self))
        return cached[1]


class Blend:
    """Datasets mixed in proportion to weights; `blend_order` decides the source of each sample of a run.

    The fingerprint is that of a run that stays in its first phase; `phases` has the others.

    Args:
        datasets: each in its own order.
        names: of their sources.
        weights: of the sources.
        num_samples: of the run.
        cache_dir: directory in which the order is kept.

    Raises:
        DataError: the datasets have different columns.
    """

    ordered = True

    def __init__(
        self,
        datasets: Sequence[Dataset],
        names: Sequence[str],
        weights: Weights,
        num_samples: int,
        cache_dir: Path,
    ) -> None:
        first = datasets[0]
        require_same_columns(datasets, names)
        self._datasets, self._names = list(datasets), list(names)
        self.mixture = mixture = Mixture.of(weights)
        self.weights = normalized(mixture.phases[0].weights)
        self.seq_length, self.target_length, self.columns = first.seq_length, first.target_length, first.columns
        later = [(phase.first, normalized(phase.weights)) for phase in mixture.phases[1:]]
        of_order = (FORMAT_VERSION, self.weights, num_samples, *([later] if later else []))
        key = hashlib.sha256(repr(of_order).encode()).hexdigest()

        def make() -> dict[str, np.ndarray]:
            source, place = mixture_order(mixture, num_samples)
            return {"source": source, "place": place}

        self._order = cached_arrays(cache_dir, f"{key}.blend", _ARRAYS, make)
        content = ["blend", *(f"{one.fingerprint} {weight!r}" for one, weight in zip(datasets, self.weights))]
        self.fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()

    @property
    def parts(self) -> Sequence[tuple[str, Dataset]]:
        """The datasets with the names of their sources."""
        return list(zip(self._names, self._datasets))

    def __len__(self) -> int:
        return len(self._order["source"])

    def sample(self, index: int) -> Sample:
        """Return sample number `index % len` of the run."""
        place = index % len(self)
        return self._datasets[int(self._order["source"][place])].sample(int(self._order["place"][place]))

    def blank(self) -> Sample:
        """Return the first dataset's blank sample."""
        return self._datasets[0].blank()

    @property
    def bad_rows(self) -> BadRows:
        """Account of the rows that were left out."""
        return total_bad_rows(self._datasets)

    def describe(self) -> str:
        """Return a line such as `blend of 0.700 a (1.2 B tokens, ...) and 0.300 b (...)`."""
        parts = zip(self.weights, self._names, self._datasets)
        first = "blend of " + " and ".join(f"{weight:.3f} {name} ({one.describe()})" for weight, name, one in parts)
        return "; ".join([first, *(self._describe_phase(phase) for phase in self.mixture.phases[1:])])

    def _describe_phase(self, phase: Phase) -> str:
        weights = zip(normalized(phase.weights), self._names)
        return f"from sample {phase.first:,} on {' and '.join(f'{weight:.3f} {name}' for weight, name in weights)}"

    def usage(self, num_samples: int) -> tuple[SourceUsage, ...]:
        """Return the usage of each source after the first `num_samples` samples of the run.

        The sources of a blend in the blend are named after both.
        """
        passes, rest = divmod(num_samples, len(self))
        source = self._order["source"]
        counts = np.bincount(source[:rest], minlength=len(self._datasets))
        if passes:
            counts = counts + passes * np.bincount(source, minlength=len(self._datasets))
        found: list[SourceUsage] = []
        weights = self._mean_weights(num_samples)
        for name, weight, samples, one in zip(self._names, weights, counts.tolist(), self._datasets):
            if isinstance(one, Blend):
                inner = one.usage(samples)
                found += [replace(use, name=f"{name}: {use.name}", weight=weight * use.weight) for use in inner]
            else:
                found.append(SourceUsage(name, weight, samples, samples / _num_epoch_samples(one)))
        return tuple(found)

    def _mean_weights(self, num_samples: int) -> list[float]:
        """Return the fractions of the sources in the first samples, by the weights of their phases."""
        if len(self.mixture.phases) == 1 or num_samples == 0:
            return self.weights
        parts = zip(self.mixture.lengths(num_samples), self.mixture.phases)
        totals = sum(length * np.array(normalized(phase.weights)) for length, phase in parts)
        return normalized(totals.tolist())  # type: ignore[union-attr]


class ConcatDataset:
    """Datasets one after the other, each in its own order: for validation.

    Args:
        datasets: at least one.
        names: of their sources.

    Raises:
        DataError: the datasets have different columns.
    """

    ordered = True

    def __init__(self, datasets: Sequence[Dataset], names: Sequence[str]) -> None:
        first = datasets[0]
        require_same_columns(datasets, names)
        self._datasets, self._names = list(datasets), list(names)
        self._index = ConcatIndex([len(one) for one in datasets])
        self.seq_length, self.target_length, self.columns = first.seq_length, first.target_length, first.columns
        content = ["succession", *(one.fingerprint for one in datasets)]
        self.fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()

    @property
    def parts(self) -> Sequence[tuple[str, Dataset]]:
        """The datasets with the names of their sources."""
        return list(zip(self._names, self._datasets))

    def __len__(self) -> int:
        return len(self._index)

    def sample(self, index: int) -> Sample:
        """Return sample number `index % len`."""
        part, offset = self._index.locate(index % len(self))
        return self._datasets[part].sample(offset)

    def blank(self) -> Sample:
        """Return the first dataset's blank sample."""
        return self._datasets[0].blank()

    @property
    def bad_rows(self) -> BadRows:
        """Account of the rows that were left out."""
        return total_bad_rows(self._datasets)

    def describe(self) -> str:
        """Return the descriptions of all datasets."""
        return "; ".join(one.describe() for one in self._datasets)


class NamedSets(ConcatDataset):
    """Validation sets with names, one after the other.

    Args:
        sets: name -> its samples; at least one.

    Raises:
        DataError: the sets have different columns.
    """

    def __init__(self, sets: Mapping[str, Dataset]) -> None:
        super().__init__(list(sets.values()), list(sets))
        self.sets = dict(sets)

    def describe(self) -> str:
        """Return the descriptions of all sets with their names."""
        return "; ".join(f"{name}: {one.describe()}" for name, one in self.sets.items())


def validation_sets(data: Dataset) -> Mapping[str, Dataset]:
    """Return validation sets by name; data without names are one set with an empty name."""
    return data.sets if isinstance(data, NamedSets) else {"": data}


def open_blend(request: DatasetRequest, weights: Weights, open_one: Callable[[DatasetRequest], Dataset]) -> Blend:
    """Open each source of a request as a dataset of its own and mix them.

    Args:
        request: its sources, and the order of the run.
        weights: of the sources.
        open_one: opens the dataset of a request with one source, such as `DataFormat.open`.

    Raises:
        DataError: a source cannot be opened, or the sources have different columns.
    """
    order = request.order
    assert order is not None, "validation takes every sample once"
    datasets = []
    for number, (source, num_samples) in enumerate(zip(request.inputs, samples_per_source(weights, order.num_samples))):
        one = open_one(replace(request, inputs=(source,), order=replace(order, num_samples=num_samples)))
        datasets.append(one if one.ordered else OrderedDataset(one, order, number))
    return Blend(datasets, [str(source) for source in request.inputs], weights, order.num_samples, request.cache_dir)


def source_usage(dataset: Dataset, num_samples: int) -> tuple[SourceUsage, ...]:
    """Return how much a run has taken from each source; empty for datasets that keep no account.

    Args:
        dataset: of the run.
        num_samples: taken so far.
    """
    return dataset.usage(num_samples) if isinstance(dataset, UsageAccount) else ()


def normalized(weights: Sequence[float]) -> list[float]:
    """Return weights scaled to a sum of 1."""
    array = np.asarray(weights, dtype=np.float64)
    return (array / array.sum()).tolist()


def samples_per_source(weights: Weights, num_samples: int) -> list[int]:
    """Return how many samples are requested from each dataset of a blend, at least one."""
    mixture = Mixture.of(weights)
    requested = [0] * len(mixture.phases[0].weights)
    for length, phase in zip(mixture.lengths(num_samples), mixture.phases):
        of_phase = [math.ceil(length * weight) for weight in normalized(phase.weights)]
        requested = [before + more for before, more in zip(requested, of_phase)]
    return [max(1, math.ceil(one * (1 + SURPLUS))) for one in requested]


def mixture_order(mixture: Mixture, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the dataset of each sample of a run, (n,) int16, and its place in that dataset, (n,) int64."""
    sources, places = [], []
    taken = np.zeros(len(mixture.phases[0].weights), dtype=np.int64)
    for length, phase in zip(mixture.lengths(num_samples), mixture.phases):
        used = np.flatnonzero(phase.weights)  # a tie may fall to a source whose weight is 0
        # Megatron normalizes weights twice; what that does to their last bits decides ties
        source, place = blend_order(normalized(normalized([phase.weights[one] for one in used])), length)
        source = used.astype(np.int16)[source]
        sources.append(source)
        places.append(place + taken[source])
        taken += np.bincount(source, minlength=len(taken))
    return np.concatenate(sources), np.concatenate(places)


def blend_order(weights: Sequence[float], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the dataset of each sample, (n,) int16, and its place in that dataset, (n,) int64.

    Each depends on all before it, so it is a plain loop; about 1 us for each sample and dataset.
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
        indices = np.flatnonzero(sources == one)
        places[indices] = np.arange(len(indices))
    return sources, places


def require_same_columns(datasets: Sequence[Dataset], names: Sequence[str]) -> None:
    """Refuse datasets whose samples do not fit into one batch.

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


def _num_epoch_samples(dataset: Dataset) -> int:
    return dataset.num_epoch_samples if isinstance(dataset, Repeated) else len(dataset)
