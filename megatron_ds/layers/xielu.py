"""xIELU (Huang and Schlag 2024, arXiv 2411.13010), an activation with two learned scalars, as Apertus has it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.param_spec import ParamSpec, make_parameter
from megatron_ds.parallel.tensor import TensorParallel

BETA, EPS = 0.5, -1e-6
_START = 0.8  # both slopes at initialisation


class XIELU(nn.Module):
    """The function a x^2 + beta x above 0, and (exp(min(x, eps)) - 1 - x) b + beta x below: (..., F/t) -> same.

    a = softplus(alpha_p) and b = beta + softplus(alpha_n). Every rank has the learned alpha_p and alpha_n, (1,), and
    features of its own. Forward: no communication. Backward: an all-reduce of each scalar's gradient over tensor.

    beta and eps are weights of the model, (1,) fp32, but no parameters: they have no gradient; see `untrained`.

    Args:
        tp: the tensor axis, which divides the features.
    """

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        for name, slope in (("alpha_p", _START), ("alpha_n", _START - BETA)):
            spec = ParamSpec((1,), fill=math.log(math.expm1(slope)), decay=False)
            setattr(self, name, make_parameter(spec, tp.axes))
        self.beta, self.eps = (self._constant(value) for value in (BETA, EPS))

    alpha_p: Tensor
    alpha_n: Tensor

    def _constant(self, value: float) -> Tensor:
        constant = self.alpha_p.new_full((1,), value, dtype=torch.float32)
        constant.spec = ParamSpec((1,), fill=value, decay=False)  # type: ignore[attr-defined]
        return constant

    def untrained(self) -> dict[str, Tensor]:
        """Return the weights of the model that are no parameters, each with its declaration, by name."""
        return {"beta": self.beta, "eps": self.eps}

    def forward(self, x: Tensor) -> Tensor:
        alpha_p, alpha_n = self.tp.inside(self.alpha_p), self.tp.inside(self.alpha_n)
        beta, eps = self.beta.to(x.dtype), self.eps.to(x.dtype)
        above = F.softplus(alpha_p) * x * x + beta * x
        below = (torch.expm1(torch.min(x, eps)) - x) * (beta + F.softplus(alpha_n)) + beta * x
        return torch.where(x > 0, above, below)
