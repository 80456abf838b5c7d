"""Feed-forward layers: plain (Vaswani et al. 2017) and gated (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.adapter_layers import AdaptableWeight, IA3Spec, LoRASpec, Output
from megatron_ds.layers.dora import column_adapter, row_adapter
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.kernels import REFERENCE, Gated, Kernels
from megatron_ds.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ds.layers.xielu import XIELU
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


# Activations with parameters of their own; they are modules, made for a tensor axis.
LEARNED: dict[str, Callable[[TensorParallel], nn.Module]] = {"xielu": XIELU}

# Their derivatives times a gradient, written to a given tensor: (gradient, x, out=)
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "silu": lambda grad, x, out: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out),
    "gelu": lambda grad, x, out: torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out),
    "gelu_tanh": lambda grad, x, out: torch.ops.aten.gelu_backward.grad_input(
        grad, x, approximate="tanh", grad_input=out
    ),
}


# How torch names the approximations of GELU
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def gated_product(wide: Tensor, activation: str, kernel: Gated | None = None) -> Tensor:
    """Return act(gate) * up: (..., 2F), gate first -> (..., F) (Shazeer 2020). Only the input is saved for backward."""
    if not torch.compiler.is_compiling():  # the compiler decides what is saved
        if kernel is not None:
            return kernel(wide)
        if activation in _BACKWARD:
            return _Gated.apply(wide, activation)
    gate, up = wide.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wide: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(wide)
        ctx.activation = activation
        gate, up = wide.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return both halves of the gradient in one tensor, as the next matmul of the backward pass reads it."""
        (wide,) = ctx.saved_tensors
        gate, up = wide.chunk(2, dim=-1)
        grad = torch.empty_like(wide, memory_format=torch.contiguous_format)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        _BACKWARD[ctx.activation](grads[0] * up, gate, grad_gate)
        torch.mul(grads[0], ACTIVATIONS[ctx.activation](gate), out=grad_up)
        return grad, None


@dataclass(frozen=True)
class MLPShape:
    """Sizes and options of one dense feed-forward layer.

    Attributes:
        hidden_size, ffn_size: H, F.
        activation: a name in `ACTIVATIONS`, or in `LEARNED` where not gated.
        gated: act(gate(x)) * up(x) instead of act(up(x)).
        bias: whether the projections have biases.
        dropout: probability, on the input of the down projection.
        std, out_std: standard deviations at initialisation, of up (and gate) and of down.
    """

    hidden_size: int
    ffn_size: int
    activation: str
    gated: bool
    bias: bool
    dropout: float
    std: float
    out_std: float

    def __post_init__(self) -> None:
        assert self.activation in ACTIVATIONS or (self.activation in LEARNED and not self.gated), self

    @property
    def cost(self) -> int:
        """Multiplications per position of all projections."""
        return self.hidden_size * (3 if self.gated else 2) * self.ffn_size

    @property
    def num_params(self) -> int:
        """Number of parameters, biases and the two of a learned activation included."""
        biases = self.hidden_size + (2 if self.gated else 1) * self.ffn_size if self.bias else 0
        return self.cost + biases + (2 if self.activation in LEARNED else 0)

    @property
    def active_params(self) -> int:
        """Number of parameters that one position uses: all of them."""
        return self.num_params

    @property
    def adaptable_weights(self) -> tuple[AdaptableWeight, ...]:
        """The weights that adapters can change."""
        return (
            AdaptableWeight("up.weight", ("gate", "up") if self.gated else ("up",), is_column=True),
            AdaptableWeight("down.weight", ("down",), is_column=False),
        )


def gated_kernel(activation: str, kernels: Kernels) -> Gated | None:
    """Return the kernel of a gated activation; None = PyTorch's formula."""
    geglu, approximate = kernels.geglu, _APPROXIMATE.get(activation)
    if geglu is not None and approximate is not None:
        return lambda wide: geglu(wide, approximate)
    return kernels.swiglu if activation == "silu" else None


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) where gated.

    (S, B, H) -> (S, B, H), or (S/t, B, H) -> (S/t, B, H) under sequence parallelism. Gate and up are one matrix of
    shape (2, F, H) divided over F, so that concatenating the shards gives the full matrix at any t.

    Args:
        shape: sizes and options.
        tp: the tensor axis; t divides F.
        rng: random streams of the dropout; its masks differ between tensor ranks, which hold different features.
        kernels: the kernels of SwiGLU and GeGLU, used unless a compiler fuses the formula.
    """

    def __init__(
        self,
        shape: MLPShape,
        tp: TensorParallel,
        rng: RngStreams | None = None,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__()
        self.shape, self.tp, self.rng = shape, tp, rng
        hidden, ffn = shape.hidden_size, shape.ffn_size
        self.gated_product = partial(
            gated_product, activation=shape.activation, kernel=gated_kernel(shape.activation, kernels)
        )
        self.activation = LEARNED[shape.activation](tp) if shape.activation in LEARNED else None
        out_shape, split_dim = ((2, ffn), 1) if shape.gated else ((ffn,), 0)
        self.up = ColumnParallelLinear(hidden, out_shape, tp, std=shape.std, bias=shape.bias, split_dim=split_dim)
        self.down = RowParallelLinear(ffn, hidden, tp, std=shape.out_std, bias=shape.bias)
        self.dropout = HiddenDropout(shape.dropout, rng, differs=tp.axis.size > 1)
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the layer to every position, also those that the mask marks as padding."""
        middle = self._before_down(x)
        if "down" not in self.adapters:
            return self.down(middle)
        adapter: Any = self.adapters["down"]
        return adapter.around(self.down, middle)

    def _before_down(self, x: Tensor) -> Tensor:
        wide = self.up(x)
        return self.dropout(self._adapted(x, wide) if self.adapters else self._middle(wide))

    def _middle(self, wide: Tensor) -> Tensor:
        return self.gated_product(wide) if self.shape.gated else self._act(wide)

    def _act(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.shape.activation](x) if self.activation is None else self.activation(x)

    def _adapted(self, x: Tensor, wide: Tensor) -> Tensor:
        gated = self.shape.gated
        found = dict(zip(("gate", "up"), wide.chunk(2, dim=-1))) if gated else {"up": wide}
        adapter: Any
        for name, adapter in self.adapters.items():
            if name != "down":
                found = adapter.adapted(x, found)
        return self._act(found["gate"]) * found["up"] if gated else self._act(found["up"])

    def adapt(self, outputs: Sequence[str], adapter: LoRASpec | IA3Spec) -> None:
        """Add an adapter to `("down",)`, or to `("gate",)`, `("up",)` or both."""
        hidden, ffn = self.shape.hidden_size, self.shape.ffn_size
        if tuple(outputs) == ("down",):
            self.adapters["down"] = row_adapter(ffn, hidden, adapter, self.tp, self.rng, self.down.frozen())
            return
        wanted = {name: Output(ffn) for name in outputs}
        layer = self.up.frozen(("gate", "up") if self.shape.gated else ("up",))
        self.adapters["_".join(outputs)] = column_adapter(hidden, wanted, adapter, self.tp, self.rng, layer)
