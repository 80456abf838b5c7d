"""Dropout with the right mask for where it stands in the grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.parallel.random import RngStreams


class HiddenDropout(nn.Module):
    """Dropout on hidden states between the parallel regions.

    All tensor ranks draw the same mask, except under sequence parallelism, where each holds another part of the
    sequence and draws its own.
    """

    def __init__(self, p: float, rng: RngStreams | None, splits_sequence: bool) -> None:
        super().__init__()
        self.p, self.rng, self.splits_sequence = p, rng, splits_sequence

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        if self.splits_sequence and self.rng is not None:
            with self.rng.sharded():
                return F.dropout(x, self.p)
        return F.dropout(x, self.p)
