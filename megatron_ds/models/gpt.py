"""Decoders, from GPT-2 to Gemma 3, as a list of layers: embedding, entry, blocks, exit, head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from megatron_ds.columns import DOCUMENT_BOUNDS
from megatron_ds.config import ModelShape
from megatron_ds.layers.cross_entropy import LogitFinish
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.embedding import LearnedPositions, PositionTable, scaled
from megatron_ds.layers.linear import ReplicatedLinear
from megatron_ds.layers.norm import Norm
from megatron_ds.models.block import BlockInputs, block_layers
from megatron_ds.models.config import Decoding, ModelConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.embedding_and_head import LanguageModelHead, WordEmbedding
from megatron_ds.models.hidden_output import hidden_layer
from megatron_ds.models.label_head import label_layer, label_probe
from megatron_ds.models.probe import (
    MOST_TOKENS,
    RANDOM_LENGTH,
    ROWS,
    Probe,
    beyond_edges,
    direction,
    fitting_length,
    next_ids,
    random_ids,
    right_padded,
)
from megatron_ds.models.sequential import HIDDEN, Activations, HeadSpec, LayerSpec
from megatron_ds.models.stack import StackConfig

MASKS = ("attention_mask", "position_ids", DOCUMENT_BOUNDS)  # columns that decide which positions attend to which


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig, ModelConfig):
    """A causal language model. As in a `StackConfig`, every option is independent.

    Attributes:
        embedding_size: E, width of the word embedding; a projection leads to H and back where they differ.
        embedding_multiplier: of the word embedding; `embedding_multiplier_in_dtype`: rounded to its dtype first.
        padding_id: an id whose row of the embedding gets no gradient as an input; None = no such id.
        embedding_norm: a norm between embedding and first block.
        positions: table of learned positions; None = no table.

        final_norm: a norm after the last block.
        head: the model has a head, for the vocabulary or for `labels`; without one it returns hidden states.
        head_bias: the logits have a bias.
        logit_multiplier: of the logits; `logit_softcap`: their bound after that.

        embedding_dropout: probability.
    """

    embedding_size: int
    padding_id: int | None = None
    embedding_multiplier: float = 1.0
    embedding_multiplier_in_dtype: bool = False
    embedding_norm: bool = False
    positions: PositionTable | None = None

    final_norm: bool = True
    head: bool = True
    head_bias: bool = False
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None

    embedding_dropout: float = 0.0

    @property
    def stacks(self) -> dict[str, StackConfig]:
        return {"blocks": self}

    @property
    def generates(self) -> bool:
        return self.head and self.labels is None

    @property
    def decoding(self) -> Decoding | None:
        return Decoding("input_ids", "embedding") if self.generates and self.causal else None

    @property
    def task_type(self) -> str | None:
        return "CAUSAL_LM" if self.generates else super().task_type

    @property
    def data_objective(self) -> str | None:
        if self.labels is not None:
            return "labelled"
        return "causal" if self.head else None

    @property
    def data_objective_options(self) -> dict[str, Any]:
        return self.label_options(self.padding_id) if self.labels is not None else {}

    @property
    def width(self) -> int:
        """Length of the states that the head takes."""
        return self.embedding_size

    def shape(self) -> ModelShape:
        return self.model_shape(self.num_layers, self.vocab_size, self.positions)

    def axis_sizes(self) -> dict[str, int]:
        rows = self.positions.rows if self.positions is not None else 0
        labels = {"y": self.labels.num_labels} if self.labels is not None else {}
        return {**super().axis_sizes(), "v": self.vocab_size, "e": self.embedding_size, "p": rows, **labels}

    def build_layers(self, ctx: BuildContext | None = None) -> list[LayerSpec]:
        return decoder_layers(self, ctx or BuildContext())

    @property
    def num_idle_params(self) -> int:
        looked_up = 0 if self.tied and self.generates else self.vocab_size * self.embedding_size
        if self.positions is not None:
            looked_up += self.positions.rows * self.hidden_size
        return looked_up + super().num_idle_params

    def flops_per_position(self, seq_length: int, target_length: int, num_params: int, num_frozen: int) -> float:
        return self.flops_per_token(num_params, num_frozen, seq_length)

    def without_dropout(self) -> Self:
        labels = self.labels.without_dropout() if self.labels is not None else None
        return replace(super().without_dropout(), embedding_dropout=0.0, labels=labels)

    def probes(self, multiple_of: int) -> tuple[list[Probe], str | None]:
        """Random ids, and a sequence that is longer than the windows and stretched positions; before them rows behind
        padding if the model returns a vector of each text."""
        longest = self.positions.max_positions if self.positions is not None else MOST_TOKENS
        length = fitting_length(min(RANDOM_LENGTH, longest), multiple_of, longest)
        found = [self._padded_probe(length)] if self.pooling is not None else []
        found.append(self._probe("random", 2, length, with_gradients=not found))
        beyond, missed = beyond_edges(self.edges, length, longest)
        if beyond is not None:
            beyond = fitting_length(beyond, multiple_of, longest)
            found.append(self._probe("past the window", 1, beyond, with_gradients=False))
        return found, missed

    def _probe(self, name: str, batch: int, length: int, *, with_gradients: bool) -> Probe:
        ids = random_ids(self.vocab_size, batch, length)
        if self.labels is not None:
            return label_probe(self.labels, name, ids, with_gradients)
        labels = {"targets": next_ids(ids)} if self.head else self._directions(batch, length)
        return Probe(name, {"input_ids": ids}, labels, with_gradients)

    def _padded_probe(self, length: int) -> Probe:
        """Return rows of different lengths, which a vector of each text depends on. Padding sees a token."""
        narrowest = min((window for window in self.windows if window is not None), default=length)
        columns = {
            "input_ids": random_ids(self.vocab_size, ROWS, length),
            "attention_mask": right_padded(ROWS, length, narrowest - 1),
        }
        return Probe("padded", columns, self._directions(ROWS, length), with_gradients=True)

    def _directions(self, batch: int, length: int) -> dict[str, Tensor]:
        vector = {"embedding_direction": direction(batch, self.width, seed=7)} if self.pooling is not None else {}
        return {"hidden_direction": direction(batch, length, self.width), **vector}


class DecoderEntry(nn.Module):
    """The steps between word embedding and first block: multiplier, projection, learned positions, norm, dropout.

    Each is present if the config has it. (S, B, E) -> (S, B, H), with S/t under sequence parallelism.
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
        """Replace the word embeddings by hidden states; all other activations pass through."""
        hidden = activations[HIDDEN]
        hidden = scaled(hidden, self.config.embedding_multiplier, self.config.embedding_multiplier_in_dtype)
        if self.projection is not None:
            hidden = self.projection(hidden)
        if self.positions is not None:
            hidden = self.positions(hidden, activations.get("attention_mask"), activations.get("position_ids"))
        if self.norm is not None:
            hidden = self.norm(hidden)
        return {**activations, HIDDEN: self.dropout(hidden)}


class DecoderExit(nn.Module):
    """The steps between last block and head: the final norm, and the projection to the width of the embedding.

    (S, B, H) -> (S, B, E), with S/t under sequence parallelism.
    """

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


def decoder_layers(config: DecoderConfig, ctx: BuildContext) -> list[LayerSpec]:
    """Return the layers of a decoder, not built yet. The label column is `targets`: the id after each position.

    A batch has `input_ids` and may have an `attention_mask`. With `position_ids`, which begin at 0 wherever a document
    does, several documents share a sequence and none attends to another.
    """
    vocab, width, std = config.vocab_size, config.embedding_size, config.init_std
    head = _head(config, ctx)
    keeps_ids = "input_ids" in head.columns
    columns = ("input_ids", *MASKS) if keeps_ids else MASKS
    embed = partial(
        WordEmbedding,
        "input_ids",
        vocab,
        width,
        ctx.tp,
        std=std,
        padding_id=config.padding_id,
        keeps_ids=keeps_ids,
    )
    hidden = LayerSpec("", nn.Identity, columns=columns)  # inputs of all layers but the first and the last
    return [
        LayerSpec("embedding", embed, hidden={}, columns=("input_ids", *MASKS)),
        replace(hidden, name="entry", build=partial(DecoderEntry, config, ctx)),
        *block_layers("blocks", config, ctx, hidden, BlockInputs()),
        replace(hidden, name="exit", build=partial(DecoderExit, config, ctx)),
        head,
    ]


def _head(config: DecoderConfig, ctx: BuildContext) -> LayerSpec:
    vocab, width = config.vocab_size, config.width
    if config.labels is not None:
        return label_layer(config.labels, width, ctx, LayerSpec("", nn.Identity))
    if not config.head:
        return hidden_layer(ctx.tp, LayerSpec("", nn.Identity), pooling=config.pooling)
    finish = LogitFinish(config.logit_multiplier, config.logit_softcap)
    return LayerSpec(
        "head",
        partial(LanguageModelHead, vocab, width, ctx, std=config.init_std, bias=config.head_bias, finish=finish),
        head=HeadSpec.per_column("targets"),
        cost=float(vocab * width),
        tied={"weight": "embedding.weight"} if config.tied else {},
    )
