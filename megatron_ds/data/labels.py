"""Labels that carry loss: how many a sample has, and that a dataset has any."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_ds.columns import TARGETS, find_column
from megatron_ds.data.dataset import Dataset, Sample
from megatron_ds.data.parts import parts_of
from megatron_ds.errors import DataError

NUM_COUNTED = 256
"""Number of samples, evenly spaced, from which the labels of a run are estimated."""


def count_labels(sample: Sample, columns: Sequence[str]) -> int:
    """Return the number of labels with loss in the label columns of a sample."""
    return sum(_count(sample, name) for name in columns)


def _count(sample: Sample, name: str) -> int:
    column, values = find_column(name), sample[name]
    return values.size if column.ignored is None else int(column.carries_loss(values).sum())


def mean_labels(data: Dataset, columns: Sequence[str]) -> tuple[float, bool]:
    """Return the mean number of labels with loss of a sample, and whether all samples were counted."""
    indices = _spaced(data)
    labels = sum(count_labels(data.sample(index), columns) for index in indices)
    return labels / len(indices), len(indices) == len(data)


def sampled_ends(data: Dataset, control: Mapping[int, str]) -> dict[int, str]:
    """Return the control tokens that are the last label of samples: the end that token ids teach, with its text.

    Args:
        data: a dataset of examples; of a stream, samples end anywhere.
        control: special tokens of the tokenizer, id -> text.
    """
    found: Counter[int] = Counter()
    indices = _spaced(data)
    for index in indices:
        targets = data.sample(index)[TARGETS.name]
        learned = targets[TARGETS.carries_loss(targets)]
        found.update(learned[-1:].tolist())
    return {token: control[token] for token in sorted(found) if token in control and found[token] * 10 >= len(indices)}


def _spaced(data: Dataset) -> list[int]:
    """Return up to NUM_COUNTED indices of samples, evenly spaced."""
    return np.linspace(0, len(data) - 1, min(len(data), NUM_COUNTED)).astype(np.int64).tolist()


def require_labels(data: Dataset, columns: Sequence[str], field: str, name: str, fix: str) -> None:
    """Refuse data of which no sample has a label with loss. Reads samples until the first that has one.

    Each source of a blend is data of its own; one sample, or one batch, may be without loss.

    Args:
        data: the dataset.
        columns: label columns that the loss reads.
        field: `data.train` or `data.valid`.
        name: its sources.
        fix: the end of the message.

    Raises:
        DataError: no label carries loss.
    """
    for source, part in parts_of(data, name):
        if not any(count_labels(part.sample(index), columns) for index in range(len(part))):
            purpose = "there is nothing to learn" if field == "data.train" else "there is nothing to validate"
            raise DataError(
                f"{field}: {source}: no label carries loss in any of {len(part):,} samples, so {purpose}; {fix}"
            )
