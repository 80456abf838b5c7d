"""The reference loss, computed from full outputs in one process, without our layers and engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.verify.compare import Difference

# Label column -> the output that it is compared with.
PREDICTED_BY = {
    "targets": "logits",
    "next_sentence_label": "next_sentence",
    "hidden_direction": "hidden",
    "pooled_direction": "pooled",
}


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


def mean_loss(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """Return the sum over label columns of the mean loss over the column's labels; fp32.

    Args:
        outputs: outputs by our names, (B, ...) each.
        labels: label columns by name: ids for cross entropy (-100: no label), or directions for an inner product.
    """
    terms = [_term(outputs[PREDICTED_BY[name]].float(), column) for name, column in labels.items()]
    return torch.stack(terms).sum()


def reference_loss(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> ReferenceLoss:
    """Return the `mean_loss` of transformers' outputs, with its scale."""
    value, chance = float(mean_loss(outputs, labels)), 0.0
    for name, column in labels.items():
        if column.is_floating_point():
            chance += float((outputs[PREDICTED_BY[name]].double() * column).norm()) / column.numel()
    return ReferenceLoss(value, max(abs(value), chance))


def _term(output: Tensor, column: Tensor) -> Tensor:
    if column.is_floating_point():
        return (output * column).mean()
    return F.cross_entropy(output.flatten(0, -2), column.flatten(), ignore_index=IGNORE_INDEX)
