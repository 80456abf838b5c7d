"""Low-rank adapters with a learned magnitude for each row of the weight (Liu et al. 2024, DoRA).

y = m * (W + s B A) x / ||W + s B A||, with the L2 norm of each row of the full weight, which gets no gradient (section
4.3 of the paper), and the frozen layer's bias unchanged. The norm is computed in fp32 at each pass, from a transient
matrix of the weight's size. Rows of a column-parallel weight are whole on a rank; for those of a row-parallel weight
the squared norms are summed over the tensor axis, one all-reduce of H numbers.

Under dropout the frozen layer is applied a second time, to the input with the adapter's dropout, as in peft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_ds.layers.adapter_layers import (
    ColumnAdapter,
    ColumnScaling,
    FrozenLayer,
    IA3Spec,
    LoRASpec,
    Output,
    RowAdapter,
    RowScaling,
)
from megatron_ds.layers.param_spec import ParamSpec, make_parameter, over_tensor
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


class ColumnDoRA(ColumnAdapter):
    """A DoRA adapter of a column-parallel layer; see `ColumnAdapter`.

    Args:
        in_features, outputs, low, tp, rng: see `ColumnAdapter`.
        layer: the frozen layer.

    Attributes:
        borrowed: parameters of another module that `forward` reads.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Mapping[str, Output],
        low: LoRASpec,
        tp: TensorParallel,
        rng: RngStreams | None,
        layer: FrozenLayer,
    ) -> None:
        super().__init__(in_features, outputs, low, tp, rng)
        self.layer, self.borrowed = layer, layer.parameters
        for name, output in outputs.items():
            spec = ParamSpec((output.size,), over_tensor(0, output.units), fill=1.0)
            self.register_parameter(f"m_{name}", make_parameter(spec, tp.axes))

    def forward(self, x: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        """Return all outputs of the layer, those of its projections with their adapters.

        Args:
            x: the layer's input.
            outputs: the layer's outputs, (..., heads, D) or (..., out/t).
        """
        weights, biases = self.layer.weights(), self.layer.biases()
        dropped, base = _dropped(self, x, outputs)
        changes, found = self.changes(dropped), dict(outputs)
        for name, num_shards in self.num_shards.items():
            norm = row_norms(weights[name], self.get_parameter(f"b_{name}"), self.a, self.low.scale)
            gain = self.tp.shared(self.get_parameter(f"m_{name}"), num_shards) / norm
            plain = _without_bias(base[name].reshape(changes[name].shape), biases[name])
            found[name] = outputs[name] + _extra(gain, plain, changes[name]).view(outputs[name].shape)
        return found

    def adapted(self, x: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self(x, outputs)


class RowDoRA(RowAdapter):
    """A DoRA adapter of a row-parallel layer; see `RowAdapter`.

    Args:
        in_features, out_features, low, tp, rng: see `RowAdapter`.
        layer: the frozen layer, with one projection.

    Attributes:
        borrowed: parameters of another module that `forward` reads.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        low: LoRASpec,
        tp: TensorParallel,
        rng: RngStreams | None,
        layer: FrozenLayer,
    ) -> None:
        super().__init__(in_features, out_features, low, tp, rng)
        self.layer, self.borrowed = layer, layer.parameters
        self.m = make_parameter(ParamSpec((out_features,), fill=1.0), tp.axes)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:  # type: ignore[override]
        """Return the layer's output with the adapter.

        Args:
            x: the layer's input.
            output: the layer's output.
        """
        (weight,), (bias,) = self.layer.weights().values(), self.layer.biases().values()
        dropped, base = _dropped(self, x, {"": output})
        gain = self.tp.between(self.m) / row_norms(weight, self.b, self.a, self.low.scale, self.tp)
        (plain,) = base.values()
        return output + _extra(gain, _without_bias(plain, bias), self.change(dropped))

    def around(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self(x, layer(x))


@torch.compiler.disable
@torch.no_grad()
def row_norms(weight: Tensor, b: Tensor, a: Tensor, scale: float, over: TensorParallel | None = None) -> Tensor:
    """Return the norms of the rows of W + s B A, (out,), in the dtype of W; they carry no gradient.

    Args:
        weight, b, a: W (out, in), B (out, r), A (r, in).
        scale: s.
        over: the tensor axis that divides `in`, over which squares are summed: all-reduce; None = `in` is whole.
    """
    squares = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).square_().sum(dim=1)
    if over is not None:
        all_reduce_(squares, over.axis)
    return squares.sqrt_().to(weight.dtype)


def _dropped(
    adapter: ColumnDoRA | RowDoRA, x: Tensor, outputs: Mapping[str, Tensor]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return the adapter's input with its dropout, and the frozen layer's outputs of that."""
    if not adapter.training or adapter.low.dropout == 0.0:
        return x, outputs
    dropped = adapter.dropout(x)
    return dropped, adapter.layer.project(dropped)


def _without_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output - bias.flatten()


def _extra(gain: Tensor, plain: Tensor, change: Tensor) -> Tensor:
    """Return what the adapter adds to the frozen layer's output: (g - 1) W x + g s B A x."""
    return (gain - 1) * plain + gain * change


def column_adapter(
    in_features: int,
    outputs: Mapping[str, Output],
    adapter: LoRASpec | IA3Spec,
    tp: TensorParallel,
    rng: RngStreams | None,
    layer: FrozenLayer,
) -> ColumnAdapter | ColumnScaling:
    """Build the adapter of a column-parallel layer; see the three classes for the arguments."""
    if isinstance(adapter, IA3Spec):
        return ColumnScaling(outputs, adapter, tp)
    if adapter.dora:
        return ColumnDoRA(in_features, outputs, adapter, tp, rng, layer)
    return ColumnAdapter(in_features, outputs, adapter, tp, rng)


def row_adapter(
    in_features: int,
    out_features: int,
    adapter: LoRASpec | IA3Spec,
    tp: TensorParallel,
    rng: RngStreams | None,
    layer: FrozenLayer,
) -> RowAdapter | RowScaling:
    """Build the adapter of a row-parallel layer; see the three classes for the arguments."""
    if isinstance(adapter, IA3Spec):
        return RowScaling(in_features, out_features, adapter, tp)
    if adapter.dora:
        return RowDoRA(in_features, out_features, adapter, tp, rng, layer)
    return RowAdapter(in_features, out_features, adapter, tp, rng)
