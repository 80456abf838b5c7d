"""The transformer block of all models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from megatron_ds.columns import DOCUMENT_BOUNDS
from megatron_ds.layers.attention import Attention
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.embedding import scaled
from megatron_ds.layers.norm import Norm
from megatron_ds.layers.rotary import RotaryTable
from megatron_ds.models.config import StackConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.feed_forward import build_feed_forward
from megatron_ds.models.sequential import HIDDEN, Activations, LayerSpec
from megatron_ds.parallel.regions import ATTENTION, BLOCK, MLP, profiled


@dataclass(frozen=True)
class BlockInputs:
    """Names of the activations that blocks read besides their hidden states; each may be absent from a batch.

    Attributes:
        mask: (B, S) mask of the stack's own positions that may be attended to.
        context, context_mask: hidden states that cross attention attends to, and the mask of their positions.
        positions: (B, S) positions within the documents that share a sequence.
        bounds: (B, D + 1) positions where these documents begin.
    """

    mask: str = "attention_mask"
    context: str | None = None
    context_mask: str | None = None
    positions: str = "position_ids"
    bounds: str = DOCUMENT_BOUNDS

    @property
    def names(self) -> tuple[str, ...]:
        names = (self.mask, self.context, self.context_mask, self.positions, self.bounds)
        return tuple(name for name in names if name is not None)


class Block(nn.Module):
    """Attention and a feed-forward layer around a residual stream; with a second stack, cross attention between them.

    The config decides where the norms stand and what the feed-forward layer reads. With the defaults:
    x + attention(norm(x)), then x + mlp(norm(x)).

    Hidden states (S, B, H), or (S/t, B, H) under sequence parallelism. Per micro-batch, forward plus backward,
    all-reduces move 8 SBH(t-1)/t elements; or all-gathers and reduce-scatters 10 SBH(t-1)/t. Cross attention to C
    positions adds 4 SBH(t-1)/t and 2 CBH(t-1)/t; or 5 SBH(t-1)/t and 3 CBH(t-1)/t.

    Args:
        config: of the stack.
        layer: index of the block in the stack, from 0.
        ctx: parallel axes, random streams and kernels.
        rotary: table of angles, shared between blocks; None = no rotation.
        inputs: names of the activations that it reads.
    """

    def __init__(
        self,
        config: StackConfig,
        layer: int,
        ctx: BuildContext,
        rotary: RotaryTable | None = None,
        inputs: BlockInputs = BlockInputs(),
    ) -> None:
        super().__init__()
        self.config, self.recompute, self.inputs = config, ctx.recompute, inputs
        self.attention_norm, self.attention_output_norm = self._norms(ctx)
        given = ctx.recompute, ctx.rng, ctx.kernels, ctx.documents
        self.attention = Attention(config.attention(layer), ctx.tp, rotary, *given)
        self.cross_norm = self.cross_output_norm = self.cross = None
        across = config.cross(layer)
        if across is not None:
            self.cross_norm, self.cross_output_norm = self._norms(ctx)
            self.cross = Attention(across, ctx.tp, None, *given)
        self.mlp_norm, self.mlp_output_norm = self._norms(ctx)
        if config.shared_norm:
            self.mlp_norm = None
        self.mlp = build_feed_forward(config.feed_forward(layer), ctx)
        self.dropout = HiddenDropout(config.residual_dropout, ctx.rng, ctx.tp.splits_sequence)
        self._run = torch.compile(self._block, dynamic=False) if ctx.compiled else self._block

    def _norms(self, ctx: BuildContext) -> tuple[Norm | None, Norm | None]:
        """Return the norm of the input of attention or MLP, and the norm of its output or of the residual sum."""
        config = self.config

        def norm(*places: str) -> Norm | None:
            if config.norm_place not in places:
                return None
            return Norm(config.hidden_size, config.norm, ctx.tp, kernels=ctx.kernels)

        return norm("input", "both"), norm("output", "both", "sum")

    def forward(self, activations: Activations) -> Activations:
        """Replace the hidden states (S, B, H); all other activations pass through."""
        names = [name for name in self.inputs.names if name in activations]
        run = partial(self._run, names)
        with profiled(BLOCK):
            return {
                **activations,
                HIDDEN: self.recompute.run("full", run, activations[HIDDEN], *(activations[name] for name in names)),
            }

    def _block(self, names: list[str], x: Tensor, *others: Tensor) -> Tensor:
        given, inputs = dict(zip(names, others)), self.inputs
        normal = _apply(self.attention_norm, x)
        with profiled(ATTENTION):
            mask, positions, bounds = (given.get(name) for name in (inputs.mask, inputs.positions, inputs.bounds))
            attended = self.attention(normal, mask, positions=positions, bounds=bounds)
        if self.config.parallel:
            start = normal if self.config.shared_norm else _apply(self.mlp_norm, x)
            return x + self._residual(attended) + self._residual(self._feed_forward(start))
        x = self._add(x, attended, self.attention_output_norm)
        if self.cross is not None:
            context, mask = (given.get(name or "") for name in (inputs.context, inputs.context_mask))
            assert context is not None, f"cross attention needs {inputs.context}, the activations are {names}"
            normal = _apply(self.cross_norm, x)
            with profiled(ATTENTION):
                attended = self.cross(normal, mask, context)
            x = self._add(x, attended, self.cross_output_norm)
        return self._add(x, self._feed_forward(_apply(self.mlp_norm, x)), self.mlp_output_norm)

    def _feed_forward(self, x: Tensor) -> Tensor:
        with profiled(MLP):
            return self.mlp(x)

    def _add(self, x: Tensor, change: Tensor, norm: Norm | None) -> Tensor:
        if self.config.norm_place == "sum":
            return _apply(norm, x + self._residual(change))
        return x + self._residual(_apply(norm, change))

    def _residual(self, change: Tensor) -> Tensor:
        return scaled(self.dropout(change), self.config.residual_multiplier, in_dtype=False)


def _apply(norm: Norm | None, x: Tensor) -> Tensor:
    return norm(x) if norm is not None else x


def block_layers(
    prefix: str, config: StackConfig, ctx: BuildContext, like: LayerSpec, inputs: BlockInputs
) -> list[LayerSpec]:
    """Return the specs of a stack's blocks; nothing is built.

    Args:
        prefix: of their names, which end with the index.
        config: of the stack.
        ctx: parallel axes, random streams and kernels.
        like: a spec with the hidden states and columns that the blocks take.
        inputs: names of the activations that they read.
    """
    tables = {rotary: RotaryTable(rotary) for rotary in config.rotary if rotary is not None}
    layers = []
    for layer in range(config.num_layers):
        rotary = config.rotary[layer] if config.rotary else None
        table = tables[rotary] if rotary is not None else None
        shared = {"attention.relative.weight": f"{prefix}.0.attention.relative.weight"}
        layers.append(
            replace(
                like,
                name=f"{prefix}.{layer}",
                build=partial(Block, config, layer, ctx, table, inputs),
                cost=config.block_cost(layer),
                is_block=True,
                tied=shared if config.relative is not None and layer > 0 else {},
            )
        )
    return layers
