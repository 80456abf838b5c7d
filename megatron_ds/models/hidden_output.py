"""Outputs of a model without a head: its hidden states, and vectors of each sequence if it has a pooler or a pooling.

A pooler is a part of the model, as BERT's. A pooling has no parameters: it picks a state or averages them, as the
modules of sentence-transformers do (Reimers and Gurevych 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.models.label_head import last_marked, mean_state, state_at
from megatron_ds.models.sequential import HIDDEN, Activations, HeadResult, HeadSpec, LayerSpec, OutputHead
from megatron_ds.parallel.collectives import reduce_from
from megatron_ds.parallel.tensor import TensorParallel

PICKS = ("first", "last", "mean")


@dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """A vector of each text, of the states of its tokens alone.

    Attributes:
        pick: the state of the "first" or the "last" token of the attention mask, or the "mean" over the mask.
        normalize: its length is made 1.
    """

    pick: str
    normalize: bool = False

    def __post_init__(self) -> None:
        assert self.pick in PICKS, self


class HiddenOutput(OutputHead):
    """Output of a model without a head, which has no loss of its own.

    It takes directions in the place of labels: the gradient of the inner product with them is a vector-Jacobian
    product, by which any gradient of the model can be checked.

    Args:
        tp: the ranks that divide the sequence.
        pooler: (S, B, H), or (S/t, B, H) under sequence parallelism -> (B, H); None = it returns no such vector.
        pooling: of the vector of each text; None = it returns no such vector.
    """

    def __init__(
        self, tp: TensorParallel, pooler: nn.Module | None = None, pooling: PoolingConfig | None = None
    ) -> None:
        super().__init__()
        self.tp, self.pooler, self.pooling = tp, pooler, pooling

    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> HeadResult:
        """Inner products of each output with its direction: `hidden_direction` (B, S, H), and (B, H) of a vector."""
        hidden = activations[HIDDEN]
        length, is_first = self.tp.full_length(hidden), self.tp.context.axis.rank == 0
        along = labels["hidden_direction"].transpose(0, 1)[self.tp.positions(length, hidden.device)]
        total = (hidden.float() * along).sum()
        if self.tp.splits_sequence:
            total = reduce_from(total, self.tp.axis)
        terms = {"hidden_direction": total}
        for name, vectors in self._vectors(activations).items():
            terms[f"{name}_direction"] = (vectors.float() * labels[f"{name}_direction"] * is_first).sum()
        return HeadResult(terms)

    def outputs(self, activations: Activations) -> Activations:
        """Return `hidden` (B, S, H); with a pooler `pooled` (B, H), and with a pooling `embedding` (B, H), fp32."""
        whole = self.tp.gather(activations[HIDDEN].detach())
        return {"hidden": whole.transpose(0, 1), **self._vectors(activations)}

    def _vectors(self, activations: Activations) -> dict[str, Tensor]:
        hidden, found = activations[HIDDEN], dict[str, Tensor]()
        if self.pooler is not None:
            found["pooled"] = self.pooler(hidden)
        if self.pooling is not None:
            found["embedding"] = text_vectors(hidden, activations.get("attention_mask"), self.pooling, self.tp)
        return found


def text_vectors(hidden: Tensor, mask: Tensor | None, pooling: PoolingConfig, tp: TensorParallel) -> Tensor:
    """Return the vector of each text: (S, B, H), or this rank's part of it -> (B, H), fp32.

    It is equal on all ranks that divide the sequence; see `TensorParallel.total` for what is communicated, (B, H).

    Args:
        hidden: the states.
        mask: (B, S), nonzero where a token is, at least once in each row; None = everywhere.
        pooling: of the vector.
        tp: the ranks that divide the sequence.
    """
    if pooling.pick == "mean":
        vectors = mean_state(hidden.float(), mask, tp)
    else:
        vectors = state_at(hidden, _token_positions(hidden, mask, pooling.pick, tp), tp).float()
    return F.normalize(vectors, dim=-1) if pooling.normalize else vectors


def _token_positions(hidden: Tensor, mask: Tensor | None, pick: str, tp: TensorParallel) -> Tensor:
    """Return the position of the first or the last token of each row, (B,) int64, in the full sequence."""
    length = tp.full_length(hidden)
    if mask is None:
        return torch.full((hidden.shape[1],), 0 if pick == "first" else length - 1, device=hidden.device)
    is_token = mask != 0
    return is_token.int().argmax(1) if pick == "first" else last_marked(is_token)


def hidden_layer(
    tp: TensorParallel,
    like: LayerSpec,
    *,
    pooler: Callable[[], nn.Module] | None = None,
    pooling: PoolingConfig | None = None,
) -> LayerSpec:
    """Return the spec of the output of a model without a head.

    Args:
        tp: the ranks that divide the sequence.
        like: a spec with the hidden states that it takes.
        pooler: makes its pooler; None = it has none.
        pooling: see `HiddenOutput`.
    """
    names = ("hidden", *(("pooled",) if pooler is not None else ()), *(("embedding",) if pooling is not None else ()))
    directions = tuple(f"{name}_direction" for name in names)
    return LayerSpec(
        "head",
        partial(_hidden_output, tp, pooler, pooling),
        hidden=like.hidden,
        columns=("attention_mask",) if pooling is not None else (),
        head=HeadSpec(directions, directions, _count_numbers, divides_labels=False),
    )


def _hidden_output(
    tp: TensorParallel, pooler: Callable[[], nn.Module] | None, pooling: PoolingConfig | None
) -> HiddenOutput:
    return HiddenOutput(tp, pooler() if pooler is not None else None, pooling)


def _count_numbers(directions: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor([column.numel() for column in directions.values()], dtype=torch.int64)
