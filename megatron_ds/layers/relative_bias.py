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
    """The biases of this rank's heads, (1, N/t, S, S); of a share of them among context ranks. No communication.

    The blocks of a stack share one table. Each block computes the biases when it needs them, so that no tensor of their
    size is kept or sent between pipeline stages. The table's gradient is summed over the stages that hold it.

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

    def forward(self, length: int, span: Span | None = None) -> Tensor:
        """Return the biases of all pairs of a row of S positions, or of those in a span."""
        by_offset = self._by_offset(length)
        if span is not None:  # its first key is nearest to its last query
            first = span.keys.start - span.queries.stop + length
            by_offset = by_offset[:, first : first + len(span.queries) + len(span.keys) - 1]
        num_keys = length if span is None else len(span.keys)
        rows = by_offset.unfold(1, num_keys, 1).to(self.weight.dtype)
        return rows.flip(1)[None]  # row q is offsets -q to S - 1 - q

    def by_distance(self, length: int) -> Tensor:
        """Return the bias of each difference key - query from -(S - 1) to S - 1, (N/t, 2S - 1) fp32.

        They are rounded as those of all pairs are, and their gradient, which is a sum over many pairs, is not.
        """
        by_offset = self._by_offset(length)
        rounded = by_offset.detach().to(self.weight.dtype).float()
        return by_offset + (rounded - by_offset.detach())

    def _by_offset(self, length: int) -> Tensor:
        # in fp32: a distance's gradient is a sum over all pairs at that distance, for which bf16 is too coarse
        return F.embedding(self._buckets_of(length), self.weight[:, self.share].float()).t()  # (heads, 2S - 1)

    def _buckets_of(self, length: int) -> Tensor:
        # computed on the CPU, whose rounding is the reference's, in 0.1 to 0.3 ms; cached, since a GPU would wait
        kept = self._buckets
        if kept is None or len(kept) != 2 * length - 1 or kept.device != self.weight.device:
            kept = self._buckets = self.positions.buckets(length, self.causal).to(self.weight.device)
        return kept
