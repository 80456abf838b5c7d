"""The dense feed-forward layer computed tile by tile of the sequence, for sequences whose activations do not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.kernels import REFERENCE, Kernels
from megatron_ds.layers.mlp import MLP, MLPShape
from megatron_ds.layers.tiling import in_tiles
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel


class TiledMLP(MLP):
    """An `MLP` of which the wide activations exist for one tile of tokens at a time.

    (S, B, H) -> (S, B, H), or (S/t, B, H) -> (S/t, B, H) under sequence parallelism, where a tile is of this rank's
    part: the t ranks' tiles of one number are gathered. Only the input is kept for the backward pass, which computes
    each tile again up to the last product. Communication is that of an `MLP` within a recomputed block, in as many
    messages as there are tiles; with an adapter of the last product, its reduction is repeated too.

    Args:
        shape: sizes and options.
        tp: the tensor axis; t divides F.
        rng: random streams of the dropout.
        kernels: the kernels of SwiGLU and GeGLU.
        tile_tokens: tokens of a tile, at least one position.
    """

    def __init__(
        self,
        shape: MLPShape,
        tp: TensorParallel,
        rng: RngStreams | None = None,
        kernels: Kernels = REFERENCE,
        *,
        tile_tokens: int,
    ) -> None:
        super().__init__(shape, tp, rng, kernels)
        self.tile_tokens = tile_tokens

    @property
    def borrowed(self) -> Sequence[nn.Parameter]:
        """Those of the layers inside: ZeRO-3 gathers them once for all tiles, and again for the backward pass."""
        return tuple(self.parameters())

    @torch.compiler.disable  # a graph would have to hold every tile
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the layer to every position, also those that the mask marks as padding."""
        drops = self.training and any(isinstance(one, HiddenDropout) and one.p for one in self.modules())
        assert self.rng is not None or not drops, "dropout without streams cannot draw its masks again"
        rng = self.rng if drops else None
        return in_tiles(super().forward, self._graph, x, tuple(self.parameters()), self.tile_tokens, rng)

    def _graph(self, x: Tensor) -> Tensor:
        """Return a tensor with the gradients of a tile's output; values only where an adapter needs them."""
        if "down" in self.adapters:
            return super().forward(x)
        return self.down.without_values(self._before_down(x))
