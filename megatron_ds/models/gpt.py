"""Decoders, from GPT-2 to Gemma 3, as a list of stages: embedding, entry, blocks, exit, head."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from megatron_ds.layers.cross_entropy import LogitFinish
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.embedding import LearnedPositions, scaled
from megatron_ds.layers.linear import ReplicatedLinear
from megatron_ds.layers.norm import Norm
from megatron_ds.models.block import BlockInputs, block_layers
from megatron_ds.models.config import DecoderConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.embedding_and_head import LanguageModelHead, WordEmbedding
from megatron_ds.models.sequential import HIDDEN, Activations, HeadSpec, LayerSpec

MASKS = ("attention_mask", "position_ids")  # what says which positions see which


class Entry(nn.Module):
    """From the word embedding to the first block: a multiplier, a projection, learned positions, a norm, dropout.

    Each is there if the config has it; (S, B, E) -> (S, B, H), or this rank's part of the sequence.
    """

    def __init__(self, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.config = config
        width, hidden, std = config.embedding_size, config.hidden_size, config.init_std
        self.projection = ReplicatedLinear(width, hidden, ctx.tp, std=std) if width != hidden else None
        table = config.positions
        self.positions = LearnedPositions(table, hidden, ctx.tp, std=std) if table is not None else None
        self.norm = Norm(hidden, config.norm, ctx.tp) if config.embedding_norm else None
        self.dropout = HiddenDropout(config.embedding_dropout, ctx.rng, ctx.tp.splits_sequence)

    def forward(self, activations: Activations) -> Activations:
        hidden = activations[HIDDEN]
        hidden = scaled(hidden, self.config.embedding_multiplier, self.config.embedding_multiplier_in_dtype)
        if self.projection is not None:
            hidden = self.projection(hidden)
        if self.positions is not None:
            hidden = self.positions(hidden, activations.get("attention_mask"), activations.get("position_ids"))
        if self.norm is not None:
            hidden = self.norm(hidden)
        return {**activations, HIDDEN: self.dropout(hidden)}


class Exit(nn.Module):
    """From the last block to the head: the final norm, and the projection to the width of the embedding."""

    def __init__(self, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        width, hidden = config.embedding_size, config.hidden_size
        self.norm = Norm(hidden, config.norm, ctx.tp, kernels=ctx.kernels) if config.final_norm else None
        self.projection = ReplicatedLinear(hidden, width, ctx.tp, std=config.init_std) if width != hidden else None

    def forward(self, activations: Activations) -> Activations:
        hidden = activations[HIDDEN]
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.projection is not None:
            hidden = self.projection(hidden)
        return {**activations, HIDDEN: hidden}


def decoder_layers(config: DecoderConfig, ctx: BuildContext | None = None) -> list[LayerSpec]:
    """The stages of a decoder, unbuilt. Labels are `targets`, of each position what follows it.

    A batch has `input_ids` and may have an `attention_mask`. With `position_ids`, which begin at 0 wherever a document
    does, several documents share a sequence and none attends to another.
    """
    ctx = ctx or BuildContext()
    vocab, width, std = config.vocab_size, config.embedding_size, config.init_std
    embed = partial(WordEmbedding, "input_ids", vocab, width, ctx.tp, std=std, padding_id=config.padding_id)
    finish = LogitFinish(config.logit_multiplier, config.logit_softcap)
    head = partial(LanguageModelHead, vocab, width, ctx, std=std, bias=config.head_bias, finish=finish)
    hidden = LayerSpec("", nn.Identity, columns=MASKS)  # what all but the first and last take
    return [
        LayerSpec("embedding", embed, hidden={}, columns=("input_ids", *MASKS)),
        replace(hidden, name="entry", build=partial(Entry, config, ctx)),
        *block_layers("blocks", config, ctx, hidden, BlockInputs()),
        replace(hidden, name="exit", build=partial(Exit, config, ctx)),
        LayerSpec(
            "head",
            head,
            head=HeadSpec.per_column("targets"),
            cost=float(vocab * width),
            tied={"weight": "embedding.weight"} if config.tied else {},
        ),
    ]
