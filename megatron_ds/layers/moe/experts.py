"""The experts of a layer that a rank has, as stacked matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec
from megatron_ds.layers.kernels import REFERENCE, Kernels
from megatron_ds.layers.mlp import ACTIVATIONS, gated_kernel, gated_product
from megatron_ds.layers.moe import padding
from megatron_ds.layers.moe.grouped import Groups, grouped_linear
from megatron_ds.layers.moe.shape import MoEShape
from megatron_ds.layers.param_spec import Matrices, ParamSpec, make_parameter, over_experts
from megatron_ds.parallel.expert import ExpertParallel


class Experts(nn.Module):
    """down_n(act(gate_n(x)) * up_n(x)) for the rows of each expert n: (rows, H) -> (rows, H).

    Of all E experts a rank has E/e. Gate and up are one matrix of shape (2, F, H) for each.

    Args:
        shape: sizes and options of the layer.
        parallel: the e ranks that divide the experts; e divides E.
        kernels: the kernels of SwiGLU and GeGLU.
    """

    def __init__(self, shape: MoEShape, parallel: ExpertParallel, kernels: Kernels = REFERENCE) -> None:
        super().__init__()
        self.shape, self.parallel, self._kernel = shape, parallel, gated_kernel(shape.activation, kernels)
        experts, ffn, hidden = shape.router.num_experts, shape.ffn_size, shape.hidden_size
        assert experts % parallel.axis.size == 0, (experts, parallel.axis.size)

        def parameter(*dims: int, std: float | None = None) -> nn.Parameter:
            is_weight = std is not None
            matrices = Matrices() if is_weight else None
            spec = ParamSpec((experts, *dims), over_experts(), std=std, decay=is_weight, matrices=matrices)
            return _make(spec, parallel)

        self.up_weight = parameter(2, ffn, hidden, std=shape.std)
        self.down_weight = parameter(hidden, ffn, std=shape.out_std)
        self.up_bias = parameter(2, ffn) if shape.bias else None
        self.down_bias = parameter(hidden) if shape.bias else None
        self.adapters = nn.ModuleDict()

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows: (rows, H), sorted by expert; there may be none.
            groups: the rows of each of this rank's experts.
        """
        if rows.device.type in padding.DEVICES:
            padded = padding.Padding.of(groups)
            return padded.remove(self._apply_each(padded.add(rows), padded.groups))
        return self._apply_each(rows, groups)

    def _apply_each(self, rows: Tensor, groups: Groups) -> Tensor:
        wide = grouped_linear(rows, groups, self.up_weight, self.up_bias)
        middle = self._activated(self._adapted("gate_up", wide, rows, groups))
        return self._adapted("down", grouped_linear(middle, groups, self.down_weight, self.down_bias), middle, groups)

    def adapt(self, outputs: Sequence[str], adapter: LoRASpec | IA3Spec) -> None:
        """Add an adapter of every expert, to `("gate", "up")`, which share its A, or to `("down",)`."""
        assert isinstance(adapter, LoRASpec) and not adapter.dora and not adapter.dropout, adapter
        hidden, ffn, name = self.shape.hidden_size, self.shape.ffn_size, "_".join(outputs)
        sizes = {"gate_up": (hidden, ffn), "down": (ffn, hidden)}[name]
        letters = tuple(f"b_{one}" for one in outputs) if len(outputs) > 1 else ("b",)
        self.adapters[name] = ExpertAdapter(self.shape.router.num_experts, sizes, letters, adapter, self.parallel)

    def _adapted(self, name: str, found: Tensor, rows: Tensor, groups: Groups) -> Tensor:
        if name not in self.adapters:
            return found
        adapter: Any = self.adapters[name]
        return found + adapter(rows, groups)

    def _activated(self, wide: Tensor) -> Tensor:
        limit = self.shape.limit
        if limit is None:
            return gated_product(wide, self.shape.activation, self._kernel)
        gate, up = wide.chunk(2, dim=-1)
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return (up + 1) * ACTIVATIONS[self.shape.activation](gate)


class ExpertAdapter(nn.Module):
    """The adapter terms s B_n A_n x for the rows of each expert n: (rows, in) -> (rows, outputs * out).

    Every expert has an A, and a B for each of the projections that share it.

    Args:
        experts: E, the number of all experts.
        sizes: in and out, of one projection.
        letters: names of the parameters B, one for each projection.
        low: rank, scale and initialisation; there is no dropout.
        parallel: the ranks that divide the experts.
    """

    def __init__(
        self,
        experts: int,
        sizes: tuple[int, int],
        letters: tuple[str, ...],
        low: LoRASpec,
        parallel: ExpertParallel,
    ) -> None:
        super().__init__()
        self.low, self._letters, (in_features, out_features) = low, letters, sizes
        split = over_experts()
        self.a = _make(low.a_spec(in_features, split, (experts,)), parallel)
        for letter in letters:
            self.register_parameter(letter, _make(low.b_spec(out_features, split, (experts,)), parallel))

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """Return the adapter terms of rows that are sorted by expert; see `Experts.forward`."""
        matrices: list[Tensor] = [self.get_parameter(letter) for letter in self._letters]
        b = torch.cat(matrices, 1) if len(matrices) > 1 else matrices[0]  # (E/e, outputs * out, r)
        return grouped_linear(grouped_linear(rows, groups, self.a), groups, b) * self.low.scale


def _make(spec: ParamSpec, parallel: ExpertParallel) -> nn.Parameter:
    """Allocate this rank's shard of a parameter of experts."""
    made = make_parameter(spec, parallel.axes)
    parallel.mark(made)
    return made
