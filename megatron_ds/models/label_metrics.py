"""Metrics of predicted labels, exact over a global batch or a validation: accuracy, macro F1, Spearman's correlation.

Accuracy and F1 follow from counts for each class, which are summed over micro-batches and data ranks. The F1 of a class
is 2 hits / (predictions + labels); macro F1 is its mean over the classes that are predicted or a label at least once.
Ranks follow from all predictions at once, so that the correlation needs them all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_ds.columns import IGNORE_INDEX


def num_tallies(num_labels: int) -> int:
    """Return the length of what `single_label_tallies` and `multi_label_tallies` return."""
    return 3 * num_labels + 2


def single_label_tallies(logits: Tensor, labels: Tensor) -> Tensor:
    """Count predictions of one class each.

    Args:
        logits: (N, L).
        labels: (N,) classes; IGNORE_INDEX = the entry does not count.

    Returns:
        fp32 (3 L + 2,): see `_tallies`.
    """
    classes, counted = torch.arange(logits.shape[-1], device=logits.device), labels != IGNORE_INDEX
    return _tallies(logits.argmax(-1)[:, None] == classes, labels[:, None] == classes, counted)


def multi_label_tallies(logits: Tensor, labels: Tensor) -> Tensor:
    """Count predictions of any number of classes each: those with a probability above one half.

    Args:
        logits: (N, L).
        labels: (N, L), above one half where a class applies; NaN = the entry does not count.

    Returns:
        fp32 (3 L + 2,): see `_tallies`.
    """
    return _tallies(logits > 0, labels > 0.5, ~labels.isnan().any(-1))


def _tallies(predicted: Tensor, actual: Tensor, counted: Tensor) -> Tensor:
    """Return hits, predictions and labels of each class, the entries that are right throughout, and all entries.

    Args:
        predicted, actual: (N, L) bool.
        counted: (N,) bool, the entries that count.
    """
    predicted, actual = predicted & counted[:, None], actual & counted[:, None]
    right = (predicted == actual).all(-1) & counted
    by_class = [(predicted & actual).sum(0), predicted.sum(0), actual.sum(0)]
    return torch.cat([*by_class, right.sum()[None], counted.sum()[None]]).float()


def classification_metrics(tallies: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Return `accuracy` and `macro_f1`; nothing if no entry counts.

    Args:
        tallies: sums of what the functions above return.
        kept: of each sample; not read.
    """
    *by_class, right, entries = tallies.tolist()
    if not entries:
        return {}
    hits, predicted, actual = np.reshape(by_class, (3, -1))
    found = predicted + actual > 0
    f1 = 2 * hits[found] / (predicted + actual)[found]
    return {"accuracy": right / entries, "macro_f1": float(f1.mean())}


def regression_metrics(tallies: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Return `spearman`, of several outputs their mean; NaN where all scores are equal, nothing without samples.

    Args:
        tallies: sums of counts; not read.
        kept: (N, 2 L) predictions and then labels; samples with a NaN do not count.
    """
    rows = kept[~np.isnan(kept).any(axis=1)]
    if not len(rows):
        return {}
    predicted, actual = np.split(rows, 2, axis=1)
    return {"spearman": float(np.mean([spearman(one, other) for one, other in zip(predicted.T, actual.T)]))}


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of the ranks of two samples, (N,) each; equal values share the mean of their ranks."""
    ranks = _ranks(one), _ranks(other)
    centred = [rank - rank.mean() for rank in ranks]
    scale = np.sqrt(np.square(centred[0]).sum() * np.square(centred[1]).sum())
    return float((centred[0] * centred[1]).sum() / scale) if scale else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
