"""Dropout with the right mask for where it stands in the grid."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.parallel.random import RngStreams


class HiddenDropout(nn.Module):
    """Dropout on hidden states.

    All tensor ranks draw the same mask of what they hold alike. Where each holds another part (of the sequence under
    sequence parallelism, of the features inside a parallel region) it draws its own.

    Args:
        p: probability.
        rng: the streams; None = torch's own.
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
