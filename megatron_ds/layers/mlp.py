"""Feed-forward layers: plain (Vaswani et al. 2017) and gated (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec, Output, column_adapter, row_adapter
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.kernels import REFERENCE, Kernels
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


# Their derivatives times a gradient, written where it belongs: (gradient, x, out=)
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "silu": lambda grad, x, out: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out),
    "gelu": lambda grad, x, out: torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=out),
    "gelu_tanh": lambda grad, x, out: torch.ops.aten.gelu_backward.grad_input(
        grad, x, approximate="tanh", grad_input=out
    ),
}


def gated_product(wide: Tensor, activation: str) -> Tensor:
    """act(gate) * up of (..., 2F), gate first -> (..., F) (Shazeer 2020). Of what it makes it keeps nothing."""
    if activation in _BACKWARD and not torch.compiler.is_compiling():  # the compiler decides what is kept
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
        """Both halves of the gradient in one tensor, as the product that follows takes it."""
        (wide,) = ctx.saved_tensors
        gate, up = wide.chunk(2, dim=-1)
        whole = torch.empty_like(wide, memory_format=torch.contiguous_format)
        grad_gate, grad_up = whole.chunk(2, dim=-1)
        _BACKWARD[ctx.activation](grads[0] * up, gate, grad_gate)
        torch.mul(grads[0], ACTIVATIONS[ctx.activation](gate), out=grad_up)
        return whole, None


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
        kernels: what SwiGLU is computed with.
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
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__()
        self.gated, self.activation = gated, activation
        self.middle: Callable[[Tensor], Tensor] = ACTIVATIONS[activation]
        if gated:
            swiglu = kernels.swiglu if activation == "silu" else None
            self.middle = swiglu or partial(gated_product, activation=activation)
        out_shape, split_dim = ((2, ffn_size), 1) if gated else ((ffn_size,), 0)
        self.up = ColumnParallelLinear(hidden_size, out_shape, tp, std=std, bias=bias, split_dim=split_dim)
        self.down = RowParallelLinear(ffn_size, hidden_size, tp, std=out_std, bias=bias)
        self.dropout = HiddenDropout(dropout, rng, differs=tp.axis.size > 1)
        self.adapters = nn.ModuleDict()
        self.tp, self.rng, self.hidden_size, self.ffn_size = tp, rng, hidden_size, ffn_size

    def forward(self, x: Tensor) -> Tensor:
        wide = self.up(x)
        middle = self.dropout(self._adapted(x, wide) if self.adapters else self.middle(wide))
        if "down" not in self.adapters:
            return self.down(middle)
        beside: Any = self.adapters["down"]
        return beside.around(self.down, middle)

    def _adapted(self, x: Tensor, wide: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        found = dict(zip(("gate", "up"), wide.chunk(2, dim=-1))) if self.gated else {"up": wide}
        adapter: Any
        for name, adapter in self.adapters.items():
            if name != "down":
                found = adapter.adapted(x, found)
        return act(found["gate"]) * found["up"] if self.gated else act(found["up"])

    def adapt(self, outputs: Sequence[str], adapter: LoRASpec | IA3Spec) -> None:
        """Put an adapter beside `("down",)`, or beside `("gate",)`, `("up",)` or both."""
        if tuple(outputs) == ("down",):
            self.adapters["down"] = row_adapter(self.ffn_size, self.hidden_size, adapter, self.tp, self.rng)
            return
        wanted = {name: Output(self.ffn_size) for name in outputs}
        self.adapters["_".join(outputs)] = column_adapter(self.hidden_size, wanted, adapter, self.tp, self.rng)
