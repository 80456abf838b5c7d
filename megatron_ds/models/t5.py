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
from megatron_ds.models.block import BlockInputs, Placement, block_stages
from megatron_ds.models.config import EncoderDecoderConfig, StackConfig
from megatron_ds.models.ends import LanguageModelHead, WordEmbedding
from megatron_ds.models.stages import HIDDEN, StageSpec, Wire

ENCODED = "encoded"


class Entry(nn.Module):
    """From the word embedding to the first block of a stack: dropout, no positions."""

    def __init__(self, config: EncoderDecoderConfig, at: Placement) -> None:
        super().__init__()
        self.dropout = HiddenDropout(config.embedding_dropout, at.rng, at.tp.splits_sequence)

    def forward(self, wire: Wire) -> Wire:
        return {**wire, HIDDEN: self.dropout(wire[HIDDEN])}


class Exit(nn.Module):
    """From the last block of a stack to who reads it: a norm and dropout.

    Args:
        config: of the model.
        stack: of the stack.
        at: where it runs.
        name: what its hidden states are called from here on.
    """

    def __init__(self, config: EncoderDecoderConfig, stack: StackConfig, at: Placement, name: str) -> None:
        super().__init__()
        self.name = name
        self.norm = Norm(stack.hidden_size, stack.norm, at.tp)
        self.dropout = HiddenDropout(config.embedding_dropout, at.rng, at.tp.splits_sequence)

    def forward(self, wire: Wire) -> Wire:
        rest = {name: tensor for name, tensor in wire.items() if name != HIDDEN}
        return {**rest, self.name: self.dropout(self.norm(wire[HIDDEN]))}


def encoder_decoder_stages(config: EncoderDecoderConfig, at: Placement | None = None) -> list[StageSpec]:
    """The stages of an encoder-decoder, unbuilt. A batch has `input_ids` and `decoder_input_ids`, and may have a mask
    of each; labels are `targets`, of each of the decoder's positions what follows it."""
    at = at or Placement()
    vocab, width, std = config.vocab_size, config.hidden_size, config.embedding_std
    masks, later = ("attention_mask", "decoder_attention_mask"), ("decoder_input_ids",)
    encoding = StageSpec("", nn.Identity, columns=(*masks, *later))
    both = {HIDDEN: "decoder_input_ids", ENCODED: "input_ids"}
    decoding = StageSpec("", nn.Identity, hidden=both, columns=masks)
    across = BlockInputs("decoder_attention_mask", ENCODED, "attention_mask")
    shared = {"weight": "embedding.weight"}

    def embed(column: str) -> Callable[[], nn.Module]:
        return partial(WordEmbedding, column, vocab, width, at.tp, std=std)

    finish = LogitFinish(config.logit_multiplier)
    return [
        StageSpec("embedding", embed("input_ids"), hidden={}, columns=("input_ids", *masks, *later)),
        replace(encoding, name="encoder.entry", build=partial(Entry, config, at)),
        *block_stages("encoder.blocks", config.encoder, at, encoding, BlockInputs()),
        replace(encoding, name="encoder.exit", build=partial(Exit, config, config.encoder, at, ENCODED)),
        replace(
            encoding,
            name="decoder.embedding",
            build=embed("decoder_input_ids"),
            hidden={ENCODED: "input_ids"},
            tied=shared,
        ),
        replace(decoding, name="decoder.entry", build=partial(Entry, config, at)),
        *block_stages("decoder.blocks", config.decoder, at, decoding, across),
        replace(decoding, name="decoder.exit", build=partial(Exit, config, config.decoder, at, HIDDEN)),
        replace(
            decoding,
            name="head",
            build=partial(LanguageModelHead, vocab, width, at, std=config.head_std, finish=finish),
            columns=(),
            labels=("targets",),
            cost=float(vocab * width),
            tied=shared if config.tied else {},
        ),
    ]
