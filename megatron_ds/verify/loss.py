"""The loss of whole outputs, as one process without our layers computes it: the formula that our engine must meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.verify.compare import Difference

# Column of the labels -> the output that it is compared with.
PREDICTED_BY = {
    "targets": "logits",
    "next_sentence_label": "next_sentence",
    "hidden_direction": "hidden",
    "pooled_direction": "pooled",
}


@dataclass(frozen=True)
class ReferenceLoss:
    """The loss of one input, and the size that it is measured against.

    Inner products with random directions add up to nearly nothing by chance, and their rounding with them: such a term
    counts as its standard deviation at least.
    """

    value: float
    size: float

    def difference(self, ours: float) -> Difference:
        apart = abs(ours - self.value)
        return Difference(apart, apart / self.size)


def mean_loss(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """The sum, over the columns of labels, of the mean over each one's labels; fp32.

    Args:
        outputs: by our names, (B, ...).
        labels: ids, of which -100 is none, to take the cross entropy with; or directions, for an inner product.
    """
    terms = [_term(outputs[PREDICTED_BY[name]].float(), column) for name, column in labels.items()]
    return torch.stack(terms).sum()


def reference_loss(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> ReferenceLoss:
    """`mean_loss` of what transformers gives."""
    value, chance = float(mean_loss(outputs, labels)), 0.0
    for name, column in labels.items():
        if column.is_floating_point():
            chance += float((outputs[PREDICTED_BY[name]].double() * column).norm()) / column.numel()
    return ReferenceLoss(value, max(abs(value), chance))


def _term(output: Tensor, column: Tensor) -> Tensor:
    if column.is_floating_point():
        return (output * column).mean()
    return F.cross_entropy(output.flatten(0, -2), column.flatten(), ignore_index=IGNORE_INDEX)
