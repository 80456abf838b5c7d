"""The reference loss, computed from full outputs in one process, without our layers and engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.verify.compare import Difference

# Label column -> the output that it is compared with.
PREDICTED_BY = {
    "targets": "logits",
    "next_sentence_label": "next_sentence",
    "label": "logits",
    "label_scores": "logits",
    "token_label": "logits",
    "hidden_direction": "hidden",
    "pooled_direction": "pooled",
    "embedding_direction": "embedding",
}
DIRECTIONS = ("hidden_direction", "pooled_direction", "embedding_direction")


@dataclass(frozen=True)
class ReferenceLoss:
    """The loss of one input, and the scale of its relative error.

    The sum of inner products with random directions is close to zero by chance, but its rounding error is not: the
    scale of such a term is at least its standard deviation.
    """

    value: float
    scale: float

    def difference(self, ours: float) -> Difference:
        delta = abs(ours - self.value)
        return Difference(delta, delta / self.scale)


def problem_of(config: Any) -> str:
    """Return transformers' name of the problem that a class with a head for labels solves, by its config object."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def mean_loss(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], problem: str | None = None) -> Tensor:
    """Return the sum over label columns of the mean loss over the column's labels; fp32.

    Args:
        outputs: outputs by our names, (B, ...) each.
        labels: label columns by name: ids for cross entropy (-100: no label), directions for an inner product, or
            scores.
        problem: transformers' name of the problem of a head for labels, which decides the loss of scores.
    """
    terms = [_term(name, outputs[PREDICTED_BY[name]].float(), column, problem) for name, column in labels.items()]
    return torch.stack(terms).sum()


def reference_loss(
    outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], problem: str | None = None
) -> ReferenceLoss:
    """Return the `mean_loss` of transformers' outputs, with its scale."""
    value, chance = float(mean_loss(outputs, labels, problem)), 0.0
    for name, column in labels.items():
        if name in DIRECTIONS:
            chance += float((outputs[PREDICTED_BY[name]].double() * column).norm()) / column.numel()
    return ReferenceLoss(value, max(abs(value), chance))


def _term(name: str, output: Tensor, column: Tensor, problem: str | None) -> Tensor:
    if name in DIRECTIONS:
        return (output * column).mean()
    if name == "label_scores":
        if problem == "regression":
            return F.mse_loss(output, column)
        return F.binary_cross_entropy_with_logits(output, column)
    return F.cross_entropy(output.flatten(0, -2), column.flatten(), ignore_index=IGNORE_INDEX)
