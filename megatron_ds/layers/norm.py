"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019) on replicated weights."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.parameter import ParamSpec, make_parameter
from megatron_ds.parallel.tensor import TensorParallel


class Norm(nn.Module):
    """Normalise the last dim; no communication forward.

    Args:
        size: length of the last dim.
        kind: "layer" (weight and bias) or "rms" (weight alone; statistics in fp32, cast down, then multiplied, as
            the Llama family does).
        eps: added to the variance or mean square.
        enter: how the replicated parameters enter the graph: `tp.between` for hidden states, `tp.inside` for heads.
            Their gradients are then complete on every rank.
    """

    def __init__(
        self, size: int, kind: str, eps: float, tp: TensorParallel, enter: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.enter = enter or tp.between
        self.weight = make_parameter(ParamSpec((size,), fill=1.0, decay=False), tp.axis)
        self.bias = make_parameter(ParamSpec((size,), decay=False), tp.axis) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        weight = self.enter(self.weight)
        if self.bias is not None:
            return F.layer_norm(x, weight.shape, weight, self.enter(self.bias), self.eps)
        return weight * F.rms_norm(x, weight.shape, None, self.eps)
