"""The experts of a layer that a rank has, as stacked matrices."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_ds.layers.kernels import REFERENCE, Kernels
from megatron_ds.layers.mlp import ACTIVATIONS, gated_kernel, gated_product
from megatron_ds.layers.moe.grouped import Groups, grouped_linear
from megatron_ds.layers.moe.shape import MoEShape
from megatron_ds.layers.param_spec import ParamSpec, make_parameter, over_experts
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
        self.shape, self._kernel = shape, gated_kernel(shape.activation, kernels)
        experts, ffn, hidden = shape.router.num_experts, shape.ffn_size, shape.hidden_size
        assert experts % parallel.axis.size == 0, (experts, parallel.axis.size)

        def parameter(*dims: int, std: float | None = None) -> nn.Parameter:
            spec = ParamSpec((experts, *dims), over_experts(), std=std, decay=std is not None)
            made = make_parameter(spec, parallel.axes)
            parallel.mark(made)
            return made

        self.up_weight = parameter(2, ffn, hidden, std=shape.std)
        self.down_weight = parameter(hidden, ffn, std=shape.out_std)
        self.up_bias = parameter(2, ffn) if shape.bias else None
        self.down_bias = parameter(hidden) if shape.bias else None

    def forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows: (rows, H), sorted by expert; there may be none.
            groups: the rows of each of this rank's experts.
        """
        wide = grouped_linear(rows, groups, self.up_weight, self.up_bias)
        return grouped_linear(self._activated(wide), groups, self.down_weight, self.down_bias)

    def _activated(self, wide: Tensor) -> Tensor:
        limit = self.shape.limit
        if limit is None:
            return gated_product(wide, self.shape.activation, self._kernel)
        gate, up = wide.chunk(2, dim=-1)
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        return (up + 1) * ACTIVATIONS[self.shape.activation](gate)
