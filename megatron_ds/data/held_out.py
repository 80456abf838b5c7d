"""A share of the training samples held out for validation: `data.valid: {share: 0.01}`.

The held-out samples are chosen at random, by the number of samples alone: the same at every seed, layout and restart. A
sample is a conversation, an example, or S tokens of text.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megatron_ds.data.blend import ConcatDataset
from megatron_ds.data.dataset import Dataset, Sample
from megatron_ds.data.noise.seeded_random import Purpose, SeededRandom
from megatron_ds.data.parts import Beginning, ends_of
from megatron_ds.data.readers.bad_rows import BadRows, total_bad_rows
from megatron_ds.data.request import DatasetRequest
from megatron_ds.errors import DataError


@dataclass(frozen=True)
class HeldOut:
    """A share of the samples, and the part that is read.

    Attributes:
        share: of the samples, more than 0 and less than 1.
        validation: whether the held-out samples are read; otherwise all others are.
        by_source: whether the share is held out of each source by itself, as blends need.
    """

    share: float
    validation: bool
    by_source: bool = False

    def part_of(self, data: Dataset, name: str) -> Dataset:
        """Return the part of a dataset that is read.

        Raises:
            DataError: the dataset has an order of its own, or too few samples.
        """
        if data.ordered:
            raise DataError(
                f"data.valid_share={self.share:g} cannot hold out samples of {name}, which are in an order of their "
                "own; use data.split for indexed data, or name files under data.valid"
            )
        number = max(1, round(self.share * len(data)))
        if number == len(data):
            raise DataError(
                f"data.valid_share={self.share:g} leaves no sample of {name} for training: it has {len(data):,}"
            )
        shuffled = SeededRandom(0, Purpose.HOLDING_OUT).order(len(data))
        chosen = shuffled[:number] if self.validation else shuffled[number:]
        held_out = f"{number:,} of {len(data):,} samples held out"
        text = f"{held_out} of {data.describe()}" if self.validation else f"{data.describe()}; {held_out}"
        bad_rows = BadRows() if self.validation else total_bad_rows([data])  # both parts are read from the same rows
        return SampleSubset(data, np.sort(chosen), f"{self.validation} {number}", text, bad_rows)

    def open(self, request: DatasetRequest, open_one: Callable[[DatasetRequest], Dataset]) -> Dataset:
        """Open the part of a request's sources, one after the other, that is read.

        Raises:
            DataError: see `part_of`; a source cannot be opened.
        """
        names = [str(source) for source in request.inputs]
        if not self.by_source or len(names) == 1:
            return self.part_of(open_one(request), ", ".join(names))
        parts = [self.open(replace(request, inputs=(source,)), open_one) for source in request.inputs]
        return ConcatDataset(parts, names)


class SampleSubset:
    """Some samples of a dataset, in its order.

    Args:
        data: a dataset that is not ordered.
        indices: (n,) of its samples, ascending.
        identity: changes with the choice of samples.
        description: for logs.
        bad_rows: account of the rows that were left out; None = none was left out.
    """

    ordered = False

    def __init__(
        self, data: Dataset, indices: np.ndarray, identity: str, description: str, bad_rows: BadRows | None = None
    ) -> None:
        self.bad_rows = bad_rows or BadRows()
        self._data, self._indices, self._description = data, indices, description
        self.seq_length, self.target_length, self.columns = data.seq_length, data.target_length, data.columns
        self.fingerprint = hashlib.sha256(f"subset\n{data.fingerprint}\n{identity}".encode()).hexdigest()

    @property
    def whole(self) -> Dataset:
        """The dataset that the samples are a part of."""
        return self._data

    @property
    def ends(self) -> dict[int, str]:
        """Special ids that the dataset teaches as an end, with their texts."""
        return ends_of(self._data)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """Special ids before each document."""
        return tuple(self._data.begin_ids) if isinstance(self._data, Beginning) else ()

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> Sample:
        """Return sample `index % n` as it is in epoch `index // n`."""
        epoch, place = divmod(index, len(self))
        return self._data.sample(epoch * len(self._data) + int(self._indices[place]))

    def blank(self) -> Sample:
        """Return the dataset's blank sample."""
        return self._data.blank()

    def describe(self) -> str:
        """Return a line such as `353,442 tokens, 690 samples of 512; 7 of 690 samples held out`."""
        return self._description
