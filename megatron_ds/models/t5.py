"""T5 (Raffel et al. 2020), from v1.0 to Flan: an encoder's stages, a decoder's, and a head.

The decoder's blocks all attend to the encoder's states, which travel on through the pipeline beside the decoder's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from megatron_ds.layers.cross_entropy import LogitFinish
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.norm import Norm
from megatron_ds.models.block import BlockInputs, block_layers
from megatron_ds.models.config import EncoderDecoderConfig, StackConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.embedding_and_head import LanguageModelHead, WordEmbedding
from megatron_ds.models.sequential import HIDDEN, Activations, HeadSpec, LayerSpec

ENCODED = "encoded"


class Entry(nn.Module):
    """From the word embedding to the first block of a stack: dropout, no positions."""

    def __init__(self, config: EncoderDecoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.dropout = HiddenDropout(config.embedding_dropout, ctx.rng, ctx.tp.splits_sequence)

    def forward(self, activations: Activations) -> Activations:
        return {**activations, HIDDEN: self.dropout(activations[HIDDEN])}


class Exit(nn.Module):
    """From the last block of a stack to who reads it: a norm and dropout.

    Args:
        config: of the model.
        stack: of the stack.
        at: where it runs.
        name: what its hidden states are called from here on.
    """

    def __init__(self, config: EncoderDecoderConfig, stack: StackConfig, ctx: BuildContext, name: str) -> None:
        super().__init__()
        self.name = name
        self.norm = Norm(stack.hidden_size, stack.norm, ctx.tp)
        self.dropout = HiddenDropout(config.embedding_dropout, ctx.rng, ctx.tp.splits_sequence)

    def forward(self, activations: Activations) -> Activations:
        rest = {name: tensor for name, tensor in activations.items() if name != HIDDEN}
        return {**rest, self.name: self.dropout(self.norm(activations[HIDDEN]))}


def encoder_decoder_layers(config: EncoderDecoderConfig, ctx: BuildContext | None = None) -> list[LayerSpec]:
    """The stages of an encoder-decoder, unbuilt. A batch has `input_ids` and `decoder_input_ids`, and may have a mask
    of each; labels are `targets`, of each of the decoder's positions what follows it."""
    ctx = ctx or BuildContext()
    vocab, width, std = config.vocab_size, config.hidden_size, config.embedding_std
    masks, later = ("attention_mask", "decoder_attention_mask"), ("decoder_input_ids",)
    encoding = LayerSpec("", nn.Identity, columns=(*masks, *later))
    both = {HIDDEN: "decoder_input_ids", ENCODED: "input_ids"}
    decoding = LayerSpec("", nn.Identity, hidden=both, columns=masks)
    across = BlockInputs("decoder_attention_mask", ENCODED, "attention_mask")
    shared = {"weight": "embedding.weight"}

    def embed(column: str) -> Callable[[], nn.Module]:
        return partial(WordEmbedding, column, vocab, width, ctx.tp, std=std)

    finish = LogitFinish(config.logit_multiplier)
    return [
        LayerSpec("embedding", embed("input_ids"), hidden={}, columns=("input_ids", *masks, *later)),
        replace(encoding, name="encoder.entry", build=partial(Entry, config, ctx)),
        *block_layers("encoder.blocks", config.encoder, ctx, encoding, BlockInputs()),
        replace(encoding, name="encoder.exit", build=partial(Exit, config, config.encoder, ctx, ENCODED)),
        replace(
            encoding,
            name="decoder.embedding",
            build=embed("decoder_input_ids"),
            hidden={ENCODED: "input_ids"},
            tied=shared,
        ),
        replace(decoding, name="decoder.entry", build=partial(Entry, config, ctx)),
        *block_layers("decoder.blocks", config.decoder, ctx, decoding, across),
        replace(decoding, name="decoder.exit", build=partial(Exit, config, config.decoder, ctx, HIDDEN)),
        replace(
            decoding,
            name="head",
            build=partial(LanguageModelHead, vocab, width, ctx, std=config.head_std, finish=finish),
            columns=(),
            head=HeadSpec.per_column("targets"),
            cost=float(vocab * width),
            tied=shared if config.tied else {},
        ),
    ]
