"""The transformer block of all models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from megatron_ds.columns import DOCUMENT_BOUNDS
from megatron_ds.layers.attention import Attention
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.embedding import scaled
from megatron_ds.layers.norm import Norm
from megatron_ds.layers.rotary import Angles, RotaryTable
from megatron_ds.models.context import BuildContext
from megatron_ds.models.feed_forward import build_feed_forward
from megatron_ds.models.sequential import HIDDEN, Activations, LayerSpec
from megatron_ds.models.stack import StackConfig
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
        self.config, self.recompute, self.inputs, self.rotary, self.tp = config, ctx.recompute, inputs, rotary, ctx.tp
        self.attention_norm, self.attention_output_norm = self._norms(ctx)
        if layer == 0 and not config.first_norm:
            self.attention_norm = None
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
        of_attention = config.attention_out_dropout
        self.attention_dropout = (
            self.dropout if of_attention is None else HiddenDropout(of_attention, ctx.rng, ctx.tp.splits_sequence)
        )
        self.is_compiled = ctx.compiled
        self._run = torch.compile(self._block, dynamic=False, backend=ctx.compiler) if ctx.compiled else self._block

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
        continues = self.attention.cache is not None  # it has the angles of its positions, and lengths that change
        if self.is_compiled and not continues:
            mask, positions = (activations.get(name) for name in (self.inputs.mask, self.inputs.positions))
            self.attention.prepare(activations[HIDDEN], mask, positions)
        names = [name for name in self.inputs.names if name in activations]
        angles = None if continues else self._angles(activations[HIDDEN], self.inputs.positions in names)
        run = partial(self._block if continues else self._run, names, angles)
        with profiled(BLOCK):
            return {
                **activations,
                HIDDEN: self.recompute.run("full", run, activations[HIDDEN], *(activations[name] for name in names)),
            }

    def make_tables(self, activations: Activations) -> None:
        """Make the tables that the forward pass on these activations makes if no other block has made them."""
        self._angles(activations[HIDDEN], self.inputs.positions in activations)

    def _angles(self, x: Tensor, every: bool) -> Angles | None:
        """Return the angles, of every position or this context rank's own, as an input of the compiled block.

        Their cache cannot be compiled.
        """
        return self.rotary.cos_sin(self.tp.full_length(x), like=x, every=every) if self.rotary is not None else None

    def _block(self, names: list[str], angles: Angles | None, x: Tensor, *others: Tensor) -> Tensor:
        given, inputs = dict(zip(names, others)), self.inputs
        normal = _apply(self.attention_norm, x)
        with profiled(ATTENTION):
            mask, positions, bounds = (given.get(name) for name in (inputs.mask, inputs.positions, inputs.bounds))
            attended = self.attention(normal, mask, positions=positions, bounds=bounds, angles=angles)
        if self.config.parallel:
            start = normal if self.config.shared_norm else _apply(self.mlp_norm, x)
            changed = x + self._residual(attended, self.attention_dropout)
            return changed + self._residual(self._feed_forward(start, given.get(inputs.mask)), self.dropout)
        next_norm = self.mlp_norm if self.cross is None else self.cross_norm
        normal, x = self._add(x, attended, self.attention_output_norm, next_norm, self.attention_dropout)
        if self.cross is not None:
            context, mask = (given.get(name or "") for name in (inputs.context, inputs.context_mask))
            assert context is not None, f"cross attention needs {inputs.context}, the activations are {names}"
            with profiled(ATTENTION):
                attended = self.cross(normal, mask, context)
            normal, x = self._add(x, attended, self.cross_output_norm, self.mlp_norm, self.dropout)
        change = self._feed_forward(normal, given.get(inputs.mask))
        _, x = self._add(x, change, self.mlp_output_norm, None, self.dropout)
        return x

    def _feed_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        with profiled(MLP):
            return self.mlp(x, mask)

    def _add(
        self, x: Tensor, change: Tensor, output_norm: Norm | None, next_norm: Norm | None, dropout: HiddenDropout
    ) -> tuple[Tensor, Tensor]:
        """Return the input of the next layer and the residual stream after a layer, in one kernel where there is one.

        Args:
            x, change: the residual stream, and the layer's output.
            output_norm: of the layer's output, or of the sum; None = no such norm.
            next_norm: of the next layer's input; None = it is the residual stream.
            dropout: of the layer's output.
        """
        if self.config.norm_place == "sum" and output_norm is not None:
            assert next_norm is None, "a norm of the sum is the next layer's input"
            normal, _ = output_norm(x, self._residual(change, dropout))
            return normal, normal
        change = self._residual(_apply(output_norm, change), dropout)
        if next_norm is not None:
            return next_norm(x, change)
        total = x + change
        return total, total

    def _residual(self, change: Tensor, dropout: HiddenDropout) -> Tensor:
        return scaled(dropout(change), self.config.residual_multiplier, in_dtype=False)


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
    tables = {rotary: RotaryTable(rotary, ctx.tp.context) for rotary in config.rotary if rotary is not None}
    builds = []
    for layer in range(config.num_layers):
        rotary = config.rotary[layer] if config.rotary else None
        table = tables[rotary] if rotary is not None else None
        builds.append(partial(Block, config, layer, ctx, table, inputs))
    shared = {name: f"{prefix}.0.{name}" for name in _shared_names(config, builds[0])}
    return [
        replace(
            like,
            name=f"{prefix}.{layer}",
            build=build,
            cost=config.block_cost(layer),
            is_block=True,
            tied=shared if layer > 0 else {},
        )
        for layer, build in enumerate(builds)
    ]


def _shared_names(config: StackConfig, build: Callable[[], Block]) -> list[str]:
    """Return the names of the parameters of a block that all blocks share. Allocates no memory for them."""
    if config.shared_blocks:
        with torch.device("meta"):
            return [name for name, _ in build().named_parameters()]
    return ["attention.relative.weight"] if config.relative is not None else []
