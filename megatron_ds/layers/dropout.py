"""Dropout whose masks are equal or different between tensor ranks, as the activations are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.parallel.random import RngStreams


class HiddenDropout(nn.Module):
    """Dropout on hidden states.

    Tensor ranks draw the same mask for activations that all of them hold in full. Where each holds a different part (of
    the sequence under sequence parallelism, of the features inside a parallel region) each draws its own.

    Args:
        p: probability.
        rng: the random streams; None = torch's default generator.
        differs: whether tensor ranks hold different parts.
    """

    def __init__(self, p: float, rng: RngStreams | None, differs: bool) -> None:
        super().__init__()
        self.p, self.rng, self.differs = p, rng, differs

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        if self.differs and self.rng is not None:
            with self.rng.sharded():
                return F.dropout(x, self.p)
        return F.dropout(x, self.p)
