"""Word embedding divided over the vocabulary, and learned positions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.parameter import ParamSpec, make_parameter
from megatron_ds.parallel.tensor import TensorParallel


class VocabParallelEmbedding(nn.Module):
    """Look up rows of a table whose rows are divided over the tensor axis (Shoeybi et al. 2019, section 3).

    ids (S, B) -> (S, B, H), or (S/t, B, H) under sequence parallelism. Forward all-reduce or reduce-scatter; backward
    nothing or all-gather. Where t does not divide V the last ranks hold zero rows that no id reaches.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel, *, std: float) -> None:
        super().__init__()
        self.tp = tp
        self.weight = make_parameter(ParamSpec((vocab_size, hidden_size), 0, std=std), tp.axis)
        self.start, self.stop = self.weight.spec.local_range(tp.axis.rank, tp.axis.size)  # type: ignore[attr-defined]

    def forward(self, ids: Tensor) -> Tensor:
        if self.tp.axis.size == 1:
            return F.embedding(ids, self.weight)
        elsewhere = (ids < self.start) | (ids >= self.stop)
        rows = F.embedding((ids - self.start).masked_fill(elsewhere, 0), self.weight)
        return self.tp.leave(rows.masked_fill(elsewhere[..., None], 0.0))


class LearnedPositions(nn.Module):
    """Add a learned vector per position: (S, B, H) -> same; or this rank's (S/t, B, H) part of it."""

    def __init__(self, max_positions: int, hidden_size: int, tp: TensorParallel, *, std: float) -> None:
        super().__init__()
        self.tp = tp
        self.weight = make_parameter(ParamSpec((max_positions, hidden_size), std=std), tp.axis)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[0] * (self.tp.axis.size if self.tp.splits_sequence else 1)
        return x + self.tp.between(self.weight)[self.tp.sequence_slice(length), None, :]
