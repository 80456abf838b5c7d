"""Samples -> the tensors of one micro-batch. Shape suffixes: `B` samples, `S` positions."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_ds.data.sample import IGNORE_INDEX, Dataset, Sample

NO_SAMPLE = -1
"""The index that stands for no sample: all its targets are ignored. It fills the last batch of a validation pass."""


def collate(dataset: Dataset, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
    """The samples at `indices`, in that order.

    Args:
        dataset: where the samples come from.
        indices: (B,); NO_SAMPLE gives input ids 0, targets IGNORE_INDEX and, where there is a mask, True throughout.

    Returns:
        `input_ids` (B, S) int64, `targets` (B, S) int64, and `attention_mask` (B, S) bool iff the dataset has one.
    """
    samples = [_ignored(dataset) if index == NO_SAMPLE else dataset.sample(int(index)) for index in indices]
    batch = {
        "input_ids": torch.from_numpy(np.stack([sample.input_ids for sample in samples])),
        "targets": torch.from_numpy(np.stack([sample.targets for sample in samples])),
    }
    masks = [sample.attention_mask for sample in samples if sample.attention_mask is not None]
    assert len(masks) == (len(samples) if dataset.has_attention_mask else 0), f"{len(masks)} masks of {len(samples)}"
    if masks:
        batch["attention_mask"] = torch.from_numpy(np.stack(masks))
    return batch


def _ignored(dataset: Dataset) -> Sample:
    length = dataset.seq_length
    return Sample(
        input_ids=np.zeros(length, dtype=np.int64),
        targets=np.full(length, IGNORE_INDEX, dtype=np.int64),
        attention_mask=np.ones(length, dtype=bool) if dataset.has_attention_mask else None,
    )
