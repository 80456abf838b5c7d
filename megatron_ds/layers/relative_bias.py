"""Learned biases by distance (Raffel et al. 2020, section 2.1): short distances have their own, long ones share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.attention_masks import Span
from megatron_ds.layers.param_spec import ParamSpec, make_parameter, over_tensor
from megatron_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class RelativePositions:
    """The mapping from distances to buckets, each of which has one bias.

    Attributes:
        num_buckets: the number of biases per head. Without causality half of them are for keys after the query.
        max_distance: the distance from which on all share the last bucket.
        std: standard deviation of the table's initialisation.
    """

    num_buckets: int
    max_distance: int
    std: float

    def buckets(self, length: int, causal: bool) -> Tensor:
        """Return the bucket of each difference key - query from -(S - 1) to S - 1, (2S - 1,) int64.

        The first half of a direction's buckets hold one distance each, the rest grow with its logarithm.
        """
        offsets = torch.arange(1 - length, length)
        count = self.num_buckets if causal else self.num_buckets // 2
        distances = (-offsets).clamp(min=0) if causal else offsets.abs()
        exact = count // 2
        # in fp32 and in this order: with another rounding a distance at the edge falls into the next bucket
        growth = torch.log(distances.float() / exact) / math.log(self.max_distance / exact)
        shared = (exact + (growth * (count - exact)).clamp(min=0).long()).clamp(max=count - 1)
        after = torch.zeros_like(offsets) if causal else (offsets > 0).long() * count
        return after + torch.where(distances < exact, distances, shared)


class RelativeBias(nn.Module):
    """The biases of this rank's heads by distance, (N/t, 2S - 1); of a share of them among context ranks.

    No communication. The blocks of a stack share one table. Each block computes the biases when it needs them, so that
    none are kept or sent between pipeline stages. The table's gradient is summed over the stages that hold it.

    Args:
        positions: the mapping from distances to buckets.
        num_heads: N.
        tp: the tensor axis, which divides the heads.
        causal: only distances to earlier keys count.
        share: which of the tensor rank's heads; None = all.
    """

    def __init__(
        self,
        positions: RelativePositions,
        num_heads: int,
        tp: TensorParallel,
        *,
        causal: bool,
        share: slice | None = None,
    ) -> None:
        super().__init__()
        self.positions, self.causal, self.share = positions, causal, share or slice(None)
        spec = ParamSpec((positions.num_buckets, num_heads), over_tensor(1), std=positions.std)
        self.weight = make_parameter(spec, tp.axes)
        self._buckets: Tensor | None = None  # (2S - 1,) for the last length, which micro-batches share

    def forward(self, length: int) -> Tensor:
        """Return the bias of each difference key - query from -(S - 1) to S - 1, (heads, 2S - 1) fp32."""
        # in fp32: a distance's gradient is a sum over all pairs at that distance, for which bf16 is too coarse
        return F.embedding(self._buckets_of(length), self.weight[:, self.share].float()).t()

    def _buckets_of(self, length: int) -> Tensor:
        # computed on the CPU, whose rounding is the reference's, in 0.1 to 0.3 ms; cached, since a GPU would wait
        kept = self._buckets
        if kept is None or len(kept) != 2 * length - 1 or kept.device != self.weight.device:
            kept = self._buckets = self.positions.buckets(length, self.causal).to(self.weight.device)
        return kept


def rounded_biases(by_distance: Tensor, dtype: torch.dtype) -> Tensor:
    """Return biases by distance rounded to a dtype, in fp32.

    So they are rounded as those of all pairs are, and their gradient, which is a sum over many pairs, is not.
    """
    rounded = by_distance.detach().to(dtype).float()
    return by_distance + (rounded - by_distance.detach())


def biases_of_pairs(by_distance: Tensor, span: Span, dtype: torch.dtype) -> Tensor:
    """Return the biases of all pairs in a span: (heads, 2S - 1) -> (1, heads, queries, keys) in a dtype."""
    first = span.keys.start - span.queries.stop + span.length  # the first key and the last query
    of_span = by_distance[:, first : first + len(span.queries) + len(span.keys) - 1]
    return of_span.unfold(1, len(span.keys), 1).to(dtype).flip(1)[None]
