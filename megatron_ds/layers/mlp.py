"""Feed-forward layers: plain (Vaswani et al. 2017) and gated (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: F.relu(x).square(),
}


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) where gated.

    (S, B, H) -> (S, B, H), sequence split over t under sequence parallelism. Gate and up are one matrix of shape
    (2, F, H) divided over F, so a plain concatenation of shards is the whole matrix at any t.

    Args:
        hidden_size, ffn_size: H, F.
        tp: the tensor axis.
        activation: a name in `ACTIVATIONS`.
        gated, bias: see above; whether the projections have biases.
        std, out_std: initialisation of up (and gate) and of down.
        dropout: on what down takes; its masks differ between tensor ranks, which hold different features.
        rng: the streams of these masks.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        tp: TensorParallel,
        *,
        activation: str,
        gated: bool,
        bias: bool,
        std: float,
        out_std: float,
        dropout: float = 0.0,
        rng: RngStreams | None = None,
    ) -> None:
        super().__init__()
        self.gated = gated
        self.act = ACTIVATIONS[activation]
        out_shape, split_dim = ((2, ffn_size), 1) if gated else ((ffn_size,), 0)
        self.up = ColumnParallelLinear(hidden_size, out_shape, tp, std=std, bias=bias, split_dim=split_dim)
        self.down = RowParallelLinear(ffn_size, hidden_size, tp, std=out_std, bias=bias)
        self.dropout = HiddenDropout(dropout, rng, differs=tp.axis.size > 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.down(self.dropout(self.act(gate) * up))
        return self.down(self.dropout(self.act(x)))
