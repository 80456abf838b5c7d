"""Decoders, from GPT-2 to Gemma 3, as a list of stages: embedding, entry, blocks, exit, head."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from megatron_ds.layers.cross_entropy import Head, LogitFinish, gather_logits, head_loss
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.embedding import LearnedPositions, VocabParallelEmbedding, scaled
from megatron_ds.layers.linear import ReplicatedLinear
from megatron_ds.layers.norm import Norm
from megatron_ds.layers.parameter import ParamSpec, make_parameter
from megatron_ds.layers.rotary import RotaryTable
from megatron_ds.models.block import DecoderBlock, Placement
from megatron_ds.models.config import DecoderConfig
from megatron_ds.models.stages import LossStage, StageSpec, Wire
from megatron_ds.parallel.collectives import copy_to, gather_sequence


class WordEmbedding(VocabParallelEmbedding):
    """ids (B, S) -> hidden (S, B, H), or this rank's (S/t, B, H)."""

    def forward(self, wire: Wire) -> Wire:  # type: ignore[override]
        ids, *rest = wire
        return (super().forward(ids.t()), *rest)


class Entry(nn.Module):
    """From the word embedding to the first block: a multiplier, a projection, learned positions, a norm, dropout.

    Each is there if the config has it; (S, B, E) -> (S, B, H), or this rank's part of the sequence.
    """

    def __init__(self, config: DecoderConfig, at: Placement) -> None:
        super().__init__()
        self.config = config
        width, hidden, std = config.embedding_size, config.hidden_size, config.init_std
        self.projection = ReplicatedLinear(width, hidden, at.tp, std=std) if width != hidden else None
        table = config.positions
        self.positions = LearnedPositions(table, hidden, at.tp, std=std) if table is not None else None
        self.norm = Norm(hidden, config.norm, at.tp) if config.embedding_norm else None
        self.dropout = HiddenDropout(config.embedding_dropout, at.rng, at.tp.splits_sequence)

    def forward(self, wire: Wire) -> Wire:
        hidden, *rest = wire
        hidden = scaled(hidden, self.config.embedding_multiplier, self.config.embedding_multiplier_in_dtype)
        if self.projection is not None:
            hidden = self.projection(hidden)
        if self.positions is not None:
            hidden = self.positions(hidden, *rest)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return (self.dropout(hidden), *rest)


class Exit(nn.Module):
    """From the last block to the head: the final norm, and the projection to the width of the embedding."""

    def __init__(self, config: DecoderConfig, at: Placement) -> None:
        super().__init__()
        width, hidden = config.embedding_size, config.hidden_size
        self.norm = Norm(hidden, config.norm, at.tp) if config.final_norm else None
        self.projection = ReplicatedLinear(hidden, width, at.tp, std=config.init_std) if width != hidden else None

    def forward(self, wire: Wire) -> Wire:
        hidden, *rest = wire
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.projection is not None:
            hidden = self.projection(hidden)
        return (hidden, *rest)


class LanguageModelHead(LossStage):
    """Next-token loss over a vocabulary divided over the tensor axis."""

    def __init__(self, config: DecoderConfig, at: Placement) -> None:
        super().__init__()
        self.vocab_size, self.tp = config.vocab_size, at.tp
        self.finish = LogitFinish(config.logit_multiplier, config.logit_softcap)
        spec = ParamSpec((config.vocab_size, config.embedding_size), 0, std=config.init_std)
        self.weight = make_parameter(spec, at.tp.axis)
        bias = ParamSpec((config.vocab_size,), 0, decay=False)
        self.bias = make_parameter(bias, at.tp.axis) if config.head_bias else None

    def forward(self, wire: Wire, targets: Tensor | None = None) -> Tensor:
        """Enters the parallel region by an all-gather under sequence parallelism, else as a copy."""
        hidden, axis = wire[0], self.tp.axis
        hidden = gather_sequence(hidden, axis) if self.tp.splits_sequence else copy_to(hidden, axis)
        head = Head(self.weight, self.bias, self.vocab_size, axis, self.finish)
        if targets is None:
            return gather_logits(hidden, head).transpose(0, 1)
        return head_loss(hidden, head, targets.t())


def decoder_stages(config: DecoderConfig, at: Placement | None = None) -> list[StageSpec]:
    """The stages of a decoder, unbuilt; the wire is (ids,) or (ids, key mask), each (B, S)."""
    at = at or Placement()
    tables = {rotary: RotaryTable(rotary) for rotary in config.rotary if rotary is not None}
    vocab, width = config.vocab_size, config.embedding_size
    embed = partial(WordEmbedding, vocab, width, at.tp, std=config.init_std, padding_id=config.padding_id)
    stages = [StageSpec("embedding", embed), StageSpec("entry", partial(Entry, config, at))]
    for layer in range(config.num_layers):
        rotary = config.rotary[layer] if config.rotary else None
        table = tables[rotary] if rotary is not None else None
        build = partial(DecoderBlock, config, layer, table, at)
        stages.append(StageSpec(f"blocks.{layer}", build, cost=block_cost(config)))
    stages.append(StageSpec("exit", partial(Exit, config, at)))
    stages.append(
        StageSpec(
            "head",
            partial(LanguageModelHead, config, at),
            cost=float(vocab * width),
            tied_to="embedding" if config.tied else None,
        )
    )
    return stages


def block_cost(config: DecoderConfig) -> float:
    """Multiplications a token of one block's matrices, which is also their number of parameters."""
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return float(config.hidden_size * (attention + (3 if config.gated else 2) * config.ffn_size))
