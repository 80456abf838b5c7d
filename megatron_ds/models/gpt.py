"""Decoders, GPT-2 to Qwen3, as a list of stages: embedding, [positions], blocks, final norm, head."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from megatron_ds.layers.cross_entropy import gather_logits, head_loss
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.embedding import LearnedPositions, VocabParallelEmbedding
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


class Positions(nn.Module):
    """What happens between the word embedding and the first block: learned positions, dropout, or nothing."""

    def __init__(self, config: DecoderConfig, at: Placement) -> None:
        super().__init__()
        self.table = None
        if config.rotary is None:
            self.table = LearnedPositions(config.max_positions, config.hidden_size, at.tp, std=config.init_std)
        self.dropout = HiddenDropout(config.embedding_dropout, at.rng, at.tp.splits_sequence)

    def forward(self, wire: Wire) -> Wire:
        hidden, *rest = wire
        return (self.dropout(self.table(hidden) if self.table is not None else hidden), *rest)


class FinalNorm(Norm):
    """The norm after the last block."""

    def forward(self, wire: Wire) -> Wire:  # type: ignore[override]
        hidden, *rest = wire
        return (super().forward(hidden), *rest)


class LanguageModelHead(LossStage):
    """Next-token loss over a vocabulary divided over the tensor axis."""

    def __init__(self, config: DecoderConfig, at: Placement) -> None:
        super().__init__()
        self.vocab_size, self.tp = config.vocab_size, at.tp
        spec = ParamSpec((config.vocab_size, config.hidden_size), 0, std=config.init_std)
        self.weight = make_parameter(spec, at.tp.axis)

    def forward(self, wire: Wire, targets: Tensor | None = None) -> Tensor:
        """Enters the parallel region by an all-gather under sequence parallelism, else as a copy."""
        hidden, axis = wire[0], self.tp.axis
        hidden = gather_sequence(hidden, axis) if self.tp.splits_sequence else copy_to(hidden, axis)
        if targets is None:
            return gather_logits(hidden, self.weight, vocab_size=self.vocab_size, axis=axis).transpose(0, 1)
        return head_loss(hidden, self.weight, targets.t(), vocab_size=self.vocab_size, axis=axis)


def decoder_stages(config: DecoderConfig, at: Placement | None = None) -> list[StageSpec]:
    """The stages of a decoder, unbuilt; the wire is (ids,) or (ids, key mask), each (B, S)."""
    at = at or Placement()
    rotary = RotaryTable(config.rotary) if config.rotary is not None else None
    embed = partial(WordEmbedding, config.vocab_size, config.hidden_size, at.tp, std=config.init_std)
    stages = [StageSpec("embedding", embed)]
    if config.rotary is None or config.embedding_dropout > 0:
        stages.append(StageSpec("positions", partial(Positions, config, at)))
    for layer in range(config.num_layers):
        stages.append(
            StageSpec(f"blocks.{layer}", partial(DecoderBlock, config, layer, rotary, at), cost=block_cost(config))
        )
    stages.append(StageSpec("final_norm", partial(FinalNorm, config.hidden_size, config.norm, config.norm_eps, at.tp)))
    stages.append(
        StageSpec(
            "head",
            partial(LanguageModelHead, config, at),
            cost=float(config.vocab_size * config.hidden_size),
            tied_to="embedding" if config.tied else None,
        )
    )
    return stages


def block_cost(config: DecoderConfig) -> float:
    """Multiplications a token of one block's matrices, which is also their number of parameters."""
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return float(config.hidden_size * (attention + (3 if config.gated else 2) * config.ffn_size))
