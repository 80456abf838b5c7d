"""Samples -> the tensors of one micro-batch. Shape suffixes: `B` samples, `S` and `T` positions as in `dataset`."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megatron_ds.columns import find_column
from megatron_ds.data.dataset import Dataset, Sample
from megatron_ds.errors import DataError

NO_SAMPLE = -1
"""The index of a blank sample, without loss. It completes the last batch of a validation pass."""


def collate(dataset: Dataset, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
    """Stack the samples at `indices`, in that order.

    Args:
        dataset: source of the samples.
        indices: (B,) of samples, in any epoch; NO_SAMPLE gives `dataset.blank()`.

    Returns:
        A tensor for each of `dataset.columns`: (B, S), (B, T) or (B,), as the column is declared.

    Raises:
        DataError: a column of a sample has another shape or dtype than declared.
    """
    samples = [dataset.blank() if index == NO_SAMPLE else dataset.sample(int(index)) for index in indices]
    for sample in samples:
        assert set(sample) == set(dataset.columns), f"{sorted(sample)} in a dataset of {sorted(dataset.columns)}"
    return {name: torch.from_numpy(_stack(dataset, name, samples)) for name in dataset.columns}


def cut_rows(batch: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Cut each row into equal shorter ones, in their order: (B, S) -> (B * S / length, length). The memory is shared.

    Args:
        batch: columns of `S` positions.
        length: a divisor of S.
    """
    return {name: column.reshape(-1, length) for name, column in batch.items()}


def _stack(dataset: Dataset, name: str, samples: Sequence[Sample]) -> np.ndarray:
    column = find_column(name)
    num_labels = len(dataset.blank()[name]) if column.length == "labels" else None
    shape = column.shape(dataset.seq_length, dataset.target_length, num_labels)
    for sample in samples:
        found = sample[name]
        if found.shape != shape or found.dtype != column.dtype:
            raise DataError(
                f"data: column {name} of a sample is {found.dtype} {found.shape}, but is declared as {column.dtype} "
                f"{shape}; let the data format return it so"
            )
    return np.stack([sample[name] for sample in samples])
