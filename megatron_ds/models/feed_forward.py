"""Builders of a block's feed-forward layer, chosen by the type of its shape.

`StackConfig.feed_forward(layer)` returns the shape, which answers for costs, parameters and adapters. Another sort of
feed-forward layer is another shape and a builder that is registered for it:

    @build_feed_forward.register
    def build_gated_memory(shape: GatedMemoryShape, ctx: BuildContext) -> nn.Module: ...

The layer is called with hidden states and the mask of padding, or None: `layer(x, mask)`.
"""

from __future__ import annotations

from functools import singledispatch

from torch import nn

from megatron_ds.layers.mlp import MLP, MLPShape
from megatron_ds.layers.moe.layer import MoE
from megatron_ds.layers.moe.shape import MoEShape
from megatron_ds.layers.tiled_mlp import TiledMLP
from megatron_ds.models.context import BuildContext
from megatron_ds.parallel.expert import ExpertParallel


@singledispatch
def build_feed_forward(shape: object, ctx: BuildContext) -> nn.Module:
    """Build the feed-forward layer of one block: (S, B, H) -> (S, B, H), with S/t under sequence parallelism.

    Args:
        shape: its sizes and options.
        ctx: parallel axes, random streams and kernels.

    Raises:
        TypeError: no builder is registered for this type of shape.
    """
    raise TypeError(f"no feed-forward layer is registered for {type(shape).__name__}")


@build_feed_forward.register
def build_mlp(shape: MLPShape, ctx: BuildContext) -> MLP:
    """Build a dense feed-forward layer."""
    if ctx.mlp_tile_tokens is not None:
        return TiledMLP(shape, ctx.tp, ctx.rng, ctx.kernels, tile_tokens=ctx.mlp_tile_tokens)
    return MLP(shape, ctx.tp, ctx.rng, ctx.kernels)


@build_feed_forward.register
def build_moe(shape: MoEShape, ctx: BuildContext) -> MoE:
    """Build a mixture of experts."""
    return MoE(shape, ctx.experts or ExpertParallel(tp=ctx.tp), ctx.routers, ctx.rng, ctx.kernels)
