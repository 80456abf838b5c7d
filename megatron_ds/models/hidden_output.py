"""Outputs of a model without a head: its hidden states, and a vector of each sequence if it has a pooler."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from megatron_ds.models.sequential import HIDDEN, Activations, HeadResult, HeadSpec, LayerSpec, OutputHead
from megatron_ds.parallel.collectives import gather_sequence, reduce_from
from megatron_ds.parallel.tensor import TensorParallel


class HiddenOutput(OutputHead):
    """Output of a model without a head, which has no loss of its own.

    It takes directions in the place of labels: the gradient of the inner product with them is a vector-Jacobian
    product, by which any gradient of the model can be checked.

    Args:
        tp: the tensor axis.
        pooler: (S, B, H), or (S/t, B, H) under sequence parallelism -> (B, H); None = it returns no such vector.
    """

    def __init__(self, tp: TensorParallel, pooler: nn.Module | None = None) -> None:
        super().__init__()
        self.tp, self.pooler = tp, pooler

    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> HeadResult:
        """Inner products with `hidden_direction` (B, S, H) and, with a pooler, `pooled_direction` (B, H)."""
        hidden = activations[HIDDEN]
        along = labels["hidden_direction"].transpose(0, 1)[self.tp.sequence_slice(self._length(hidden))]
        total = (hidden.float() * along).sum()
        if self.tp.splits_sequence:
            total = reduce_from(total, self.tp.axis)
        if self.pooler is None:
            return HeadResult({"hidden_direction": total})
        pooled = (self.pooler(hidden).float() * labels["pooled_direction"]).sum()
        return HeadResult({"hidden_direction": total, "pooled_direction": pooled})

    def outputs(self, activations: Activations) -> Activations:
        """Return `hidden` (B, S, H) and, with a pooler, `pooled` (B, H)."""
        hidden = activations[HIDDEN]
        whole = gather_sequence(hidden, self.tp.axis) if self.tp.splits_sequence else hidden
        pooled = {"pooled": self.pooler(hidden)} if self.pooler is not None else {}
        return {"hidden": whole.transpose(0, 1), **pooled}

    def _length(self, hidden: Tensor) -> int:
        return hidden.shape[0] * (self.tp.axis.size if self.tp.splits_sequence else 1)


def hidden_layer(build: Callable[[], HiddenOutput], like: LayerSpec, *, pools: bool = False) -> LayerSpec:
    """Return the spec of the output of a model without a head.

    Args:
        build: makes it.
        like: a spec with the hidden states that it takes.
        pools: whether it has a pooler.
    """
    labels = ("hidden_direction", "pooled_direction") if pools else ("hidden_direction",)
    return LayerSpec("head", build, hidden=like.hidden, head=HeadSpec(labels, labels, _count_numbers))


def _count_numbers(directions: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor([column.numel() for column in directions.values()], dtype=torch.int64)
