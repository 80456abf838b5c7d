"""Samples -> the tensors of one micro-batch. Shape suffixes: `B` samples, `S` and `T` positions as in `sample`."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_ds.data.dataset import Dataset

NO_SAMPLE = -1
"""The index that stands for no sample: a blank one without loss. It fills the last batch of a validation pass."""


def collate(dataset: Dataset, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
    """The samples at `indices`, in that order.

    Args:
        dataset: where the samples come from.
        indices: (B,) of samples, in any epoch; NO_SAMPLE gives `dataset.blank()`.

    Returns:
        A tensor for each of `dataset.columns`: (B, S) or (B, T) where the samples have (S,) or (T,), else (B,).
    """
    samples = [dataset.blank() if index == NO_SAMPLE else dataset.sample(int(index)) for index in indices]
    for sample in samples:
        assert set(sample) == set(dataset.columns), f"{sorted(sample)} in a dataset of {sorted(dataset.columns)}"
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in dataset.columns}
