"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019), in the forms that decoders use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.kernels import REFERENCE, Kernels
from megatron_ds.layers.param_spec import AxisSplit, ParamSpec, make_parameter, over_tensor
from megatron_ds.parallel.collectives import sum_over
from megatron_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class NormStyle:
    """The normalisation of a model.

    Attributes:
        kind: "layer" (mean and variance; weight and bias) or "rms" (mean square; weight alone).
        eps: added to the variance or mean square.
        affine: whether there are a weight and bias at all.
        bias: whether a "layer" norm with a weight has a bias too.
        one_plus: the factor is 1 + weight (Gemma, Nemotron); the weight is stored around 0, as in Hugging Face's
            checkpoints. A LayerNorm adds 1 in the dtype of the weight.
        fp32_weight: an RMSNorm multiplies by its weight in fp32 and casts down last (Gemma, OLMo 2); the Llama family
            casts down first.
    """

    kind: str
    eps: float
    affine: bool = True
    bias: bool = True
    one_plus: bool = False
    fp32_weight: bool = False

    def __post_init__(self) -> None:
        assert self.kind in ("layer", "rms"), self
        assert self.kind == "rms" or not self.fp32_weight, self

    @property
    def has_bias(self) -> bool:
        """True if it adds a learned vector."""
        return self.kind == "layer" and self.affine and self.bias

    @property
    def is_llama(self) -> bool:
        """True for Llama's RMSNorm, weight * (x / rms(x)), cast down before the product."""
        return self.kind == "rms" and self.affine and not self.one_plus and not self.fp32_weight

    def spec(self, size: int, splits: tuple[AxisSplit, ...] = ()) -> ParamSpec:
        """Return the declaration of its weight, with which the norm starts as the identity."""
        fill = 0.0 if self.one_plus else 1.0
        return ParamSpec((size,), splits, fill=fill, decay=False)

    def scale(self, x: Tensor, normal: Tensor, weight: Tensor | None) -> Tensor:
        """Multiply the normalised fp32 `normal` by the weight, and give it the dtype of `x`."""
        if weight is None:
            return normal.type_as(x)
        if not self.fp32_weight:
            return (1.0 + weight if self.one_plus else weight) * normal.type_as(x)
        factor = weight.float()
        return (normal * (1.0 + factor if self.one_plus else factor)).type_as(x)


class Norm(nn.Module):
    """Normalisation of the last dim. Forward: no communication. Backward: see `enter`.

    Args:
        size: length of the last dim.
        style: which norm.
        tp: the tensor axis, over which the parameters are replicated.
        enter: how the parameters enter the graph: `tp.between` (the default) for hidden states, `tp.inside` for heads.
            Their gradients are then complete on every rank.
        kernels: the kernels of RMSNorm, used unless a compiler fuses the formula.
    """

    def __init__(
        self,
        size: int,
        style: NormStyle,
        tp: TensorParallel,
        enter: Callable[[Tensor], Tensor] | None = None,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__()
        self.size, self.style = size, style
        self.kernels = kernels if style.kind == "rms" and style.affine else REFERENCE
        self.enter = enter or tp.between
        self.weight = make_parameter(style.spec(size), tp.axes) if style.affine else None
        self.bias = make_parameter(ParamSpec((size,), decay=False), tp.axes) if style.has_bias else None

    def forward(self, x: Tensor, change: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise: (..., size) -> (..., size).

        With `change`, a term of the residual stream of the same shape, return the norm of x + change and this sum.
        """
        weight = self.enter(self.weight) if self.weight is not None else None
        kernels = REFERENCE if torch.compiler.is_compiling() else self.kernels
        if change is None:
            return self._normal(x, weight, kernels)
        if kernels.add_rms_norm is not None and weight is not None and self.style.is_llama and x.dtype == change.dtype:
            return kernels.add_rms_norm(x, change, weight, self.style.eps)
        total = x + change
        return self._normal(total, weight, kernels), total

    def _normal(self, x: Tensor, weight: Tensor | None, kernels: Kernels) -> Tensor:
        style = self.style
        if style.kind == "layer":
            bias = self.enter(self.bias) if self.bias is not None else None
            factor = weight + 1.0 if weight is not None and style.one_plus else weight
            return F.layer_norm(x, (self.size,), factor, bias, style.eps)
        if weight is not None and style.is_llama and kernels.rms_norm is not None:
            return kernels.rms_norm(x, weight, style.eps)
        if weight is not None and style.fp32_weight and kernels.fp32_rms_norm is not None:
            return kernels.fp32_rms_norm(x, weight, style.eps, 1.0 if style.one_plus else 0.0)
        if not style.fp32_weight:
            normal = F.rms_norm(x, (self.size,), None, style.eps)  # fp32 inside, cast down at the end
            return style.scale(x, normal, weight)
        return style.scale(x, F.rms_norm(x.float(), (self.size,), None, style.eps), weight)


class AcrossHeadsNorm(nn.Module):
    """RMSNorm over all heads of a token at once, where the tensor axis divides the heads: the q/k norm of OLMo 2.

    (S, B, heads/t, D) -> same. Forward and backward: an all-reduce of one fp32 number per token.

    Args:
        heads, head_dim: sizes of the full model.
        style: the style of an RMSNorm.
        tp: the tensor axis. If it has more ranks than `heads` divide into, neighbours hold the same heads.
    """

    def __init__(self, heads: int, head_dim: int, style: NormStyle, tp: TensorParallel) -> None:
        super().__init__()
        assert style.kind == "rms", style
        self.style, self.tp, self.size = style, tp, heads * head_dim
        self.spec = style.spec(self.size, over_tensor(0, heads))
        self.weight = make_parameter(self.spec, tp.axes)

    def forward(self, x: Tensor) -> Tensor:
        num_shards = self.spec.num_shards("tensor", self.tp.axis.size)
        holders = self.tp.axis.size // num_shards
        flat = x.flatten(-2).float()
        squares = sum_over(flat.square().sum(-1, keepdim=True), self.tp.axis) / (holders * self.size)
        normal = flat * torch.rsqrt(squares + self.style.eps)
        return self.style.scale(x, normal, self.tp.shared(self.weight, num_shards)).view_as(x)


class EachHeadNorm(nn.Module):
    """LayerNorm of every head of a token by a weight of its own, divided with the heads: the q/k norm of Command R+.

    (S, B, heads/t, D) -> same. Forward: no communication. Backward: nothing, or the sum over the ranks that hold the
    same heads.

    Args:
        heads, head_dim: sizes of the full model.
        style: the style of a LayerNorm without bias.
        tp: the tensor axis. If it has more ranks than `heads` divide into, neighbours hold the same heads.
    """

    def __init__(self, heads: int, head_dim: int, style: NormStyle, tp: TensorParallel) -> None:
        super().__init__()
        assert style.kind == "layer" and style.affine and not style.bias and not style.one_plus, style
        self.style, self.tp, self.size = style, tp, head_dim
        self.spec = ParamSpec((heads, head_dim), over_tensor(0, heads), fill=1.0, decay=False)
        self.weight = make_parameter(self.spec, tp.axes)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.tp.shared(self.weight, self.spec.num_shards("tensor", self.tp.axis.size))
        normal = F.layer_norm(x.float(), (self.size,), None, None, self.style.eps)
        return (normal * weight.float()).type_as(x)
