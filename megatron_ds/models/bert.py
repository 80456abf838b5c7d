"""Encoders, from BERT (Devlin et al. 2019) to ModernBERT (Warner et al. 2024), as a list of layers: embedding, entry,
blocks, exit, head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.config import ModelShape
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.embedding import LearnedPositions, PositionTable, TokenTypes
from megatron_ds.layers.linear import ReplicatedLinear
from megatron_ds.layers.mlp import ACTIVATIONS
from megatron_ds.layers.norm import Norm
from megatron_ds.models.block import BlockInputs, block_layers
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.embedding_and_head import LanguageModelHead, WordEmbedding
from megatron_ds.models.hidden_output import hidden_layer
from megatron_ds.models.label_head import label_layer, probe_labels, state_at
from megatron_ds.models.probe import (
    MOST_TOKENS,
    RANDOM_LENGTH,
    ROWS,
    Probe,
    beyond_edges,
    fitting_length,
    random_ids,
    right_padded,
    seeded,
    some_labels,
)
from megatron_ds.models.sequential import HIDDEN, Activations, HeadResult, HeadSpec, LayerSpec
from megatron_ds.models.stack import StackConfig
from megatron_ds.parallel.tensor import TensorParallel

MASKS = ("attention_mask",)  # columns that decide which positions attend to which


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(StackConfig, ModelConfig):
    """A bidirectional encoder and its heads. As in a `StackConfig`, every option is independent.

    Attributes:
        embedding_size: E, width of the word embedding, of the tables of positions and segments, and of their norm.
        embedding_projection: a projection with a bias leads from E to H, which else are equal.
        padding_id: an id whose row of the embedding gets no gradient as an input; None = no such id.
        positions: table of learned positions; None = no table.
        num_token_types: rows of the table of segments; 0 = no table.
        embedding_norm: a norm between embedding and first block.

        final_norm: a norm after the last block.
        masked_lm: it has a head that predicts masked tokens, by its word embedding if that is `tied`.
        pooler: it computes a vector per sequence from the first position's state.
        next_sentence: it predicts from that vector whether the second segment follows the first.
        head_activation: of the head that predicts masked tokens, a name in `layers.mlp.ACTIVATIONS`; None = its logits
            are those of the hidden states, without a projection to E, activation and norm.
        head_transform_bias, head_bias: whether that projection and the logits have biases.

        embedding_dropout: probability.
    """

    embedding_size: int
    embedding_projection: bool = False
    padding_id: int | None
    positions: PositionTable | None = None
    num_token_types: int = 0
    embedding_norm: bool = True

    final_norm: bool = False
    masked_lm: bool = True
    pooler: bool = False
    next_sentence: bool = False
    head_activation: str | None
    head_transform_bias: bool = True
    head_bias: bool = True

    embedding_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        same_width = self.embedding_size == self.hidden_size
        assert same_width or self.embedding_projection, "the embedding has the width of the blocks without a projection"
        assert same_width or self.head_activation is not None, "the logits are those of states of the embedding's width"
        wanted = self.pooler if self.masked_lm else False
        assert self.next_sentence == wanted, (
            "with a head for masked tokens, the pooler has no other use than to predict the next sentence"
        )

    @property
    def stacks(self) -> dict[str, StackConfig]:
        return {"blocks": self}

    @property
    def generates(self) -> bool:
        return False

    @property
    def data_objective(self) -> str | None:
        if self.labels is not None:
            return "labelled"
        return "masked" if self.masked_lm else None

    @property
    def data_objective_options(self) -> dict[str, Any]:
        if self.labels is not None:
            return {**self.label_options(self.padding_id), "num_token_types": self.num_token_types}
        return {
            "next_sentence": self.next_sentence,
            "num_token_types": self.num_token_types,
            "padding_id": self.padding_id or 0,
        }

    def shape(self) -> ModelShape:
        return self.model_shape(self.num_layers, self.vocab_size, self.positions)

    def axis_sizes(self) -> dict[str, int]:
        sizes = {"v": self.vocab_size, "e": self.embedding_size, "p": self._num_positions, "s": self.num_token_types}
        labels = {"y": self.labels.num_labels} if self.labels is not None else {}
        return {**super().axis_sizes(), **sizes, "c": 2, **labels}

    @property
    def _num_positions(self) -> int:
        """Rows of the table of positions."""
        return self.positions.rows if self.positions is not None else 0

    def build_layers(self, ctx: BuildContext | None = None) -> list[LayerSpec]:
        return encoder_layers(self, ctx or BuildContext())

    @property
    def num_idle_params(self) -> int:
        words = 0 if self.tied and self.masked_lm else self.vocab_size
        return (words + self.num_token_types + self._num_positions) * self.embedding_size + super().num_idle_params

    def flops_per_position(self, seq_length: int, target_length: int, num_params: int, num_frozen: int) -> float:
        return self.flops_per_token(num_params, num_frozen, seq_length)

    def without_dropout(self) -> Self:
        labels = self.labels.without_dropout() if self.labels is not None else None
        return replace(super().without_dropout(), embedding_dropout=0.0, labels=labels)

    def probes(self, multiple_of: int) -> tuple[list[Probe], str | None]:
        """Ids behind padding, with segments if the model has several; bare ids, as many users pass them; and a sequence
        that is longer than the windows and stretched positions."""
        longest = self.positions.max_positions if self.positions is not None else MOST_TOKENS
        length = fitting_length(min(RANDOM_LENGTH, longest), multiple_of, longest)
        narrowest = min((window for window in self.windows if window is not None), default=length)
        columns = {
            "input_ids": random_ids(self.vocab_size, ROWS, length),
            # transformers lets padding that sees no token attend to everything, and here it attends to nothing
            "attention_mask": right_padded(ROWS, length, narrowest - 1),
        }
        if self.padding_id is not None:
            columns["input_ids"].masked_fill_(~columns["attention_mask"], self.padding_id)
        if self.num_token_types > 1:
            columns["token_type_ids"] = torch.randint(0, self.num_token_types, (ROWS, length), generator=seeded(2))
        padded = Probe("padded", columns, self._probe_labels(columns["attention_mask"]), with_gradients=True)
        beyond, missed = beyond_edges(self.edges, length, longest)
        found = [padded, self._bare_probe("bare", 2, length)]
        if beyond is not None:
            found.append(self._bare_probe("past the window", 1, fitting_length(beyond, multiple_of, longest)))
        return found, missed

    def _bare_probe(self, name: str, batch: int, length: int) -> Probe:
        columns = {"input_ids": random_ids(self.vocab_size, batch, length, seed=1)}
        everywhere = torch.ones(batch, length, dtype=torch.bool)
        return Probe(name, columns, self._probe_labels(everywhere), with_gradients=False)

    def _probe_labels(self, seen: Tensor) -> dict[str, Tensor]:
        """Labels of some positions that are `seen` (B, S); or directions, for a model that predicts nothing."""
        (batch, length), generator = seen.shape, seeded(3)
        if self.labels is not None:
            return probe_labels(self.labels, seen)
        if not self.masked_lm:
            labels = {"hidden_direction": torch.randn(batch, length, self.hidden_size, generator=generator)}
            if self.pooler:
                labels["pooled_direction"] = torch.randn(batch, self.hidden_size, generator=generator)
            if self.pooling is not None:
                labels["embedding_direction"] = torch.randn(batch, self.hidden_size, generator=generator)
            return labels
        labels = {"targets": some_labels(random_ids(self.vocab_size, batch, length, seed=4), seen)}
        if self.next_sentence:
            labels["next_sentence_label"] = torch.tensor([1, IGNORE_INDEX, 0])[:batch]
        return labels


class EncoderEntry(nn.Module):
    """The steps between word embedding and first block: learned positions, segments, norm, dropout, projection.

    Each is present if the config has it. (S, B, E) -> (S, B, H), with S/t under sequence parallelism.
    """

    def __init__(self, config: EncoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        width, hidden, std = config.embedding_size, config.hidden_size, config.init_std
        table, types, projects = config.positions, config.num_token_types, config.embedding_projection
        self.skipped_id = table.skipped_id if table is not None else None
        self.positions = LearnedPositions(table, width, ctx.tp, std=std) if table is not None else None
        self.token_types = TokenTypes(types, width, ctx.tp, std=std) if types else None
        self.norm = Norm(width, config.norm, ctx.tp) if config.embedding_norm else None
        self.dropout = HiddenDropout(config.embedding_dropout, ctx.rng, ctx.tp.splits_sequence)
        self.projection = ReplicatedLinear(width, hidden, ctx.tp, std=std, bias=True) if projects else None

    def forward(self, activations: Activations) -> Activations:
        """Replace the word embeddings by hidden states; no column but the masks passes through."""
        hidden = activations[HIDDEN]
        if self.token_types is not None:
            hidden = self.token_types(hidden, activations.get("token_type_ids"))
        if self.positions is not None:
            seen = activations["input_ids"] != self.skipped_id if self.skipped_id is not None else None
            hidden = self.positions(hidden, seen)
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = self.dropout(hidden)
        if self.projection is not None:
            hidden = self.projection(hidden)
        return {**{name: activations[name] for name in MASKS if name in activations}, HIDDEN: hidden}


class EncoderExit(nn.Module):
    """The final norm, between last block and head: (S, B, H) -> same, with S/t under sequence parallelism."""

    def __init__(self, config: EncoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.norm = Norm(config.hidden_size, config.norm, ctx.tp, kernels=ctx.kernels)

    def forward(self, activations: Activations) -> Activations:
        return {**activations, HIDDEN: self.norm(activations[HIDDEN])}


class Pooler(nn.Module):
    """Projection of the first position's state to a vector a sequence: (S, B, H) -> (B, H), equal on all ranks.

    The first rank of those that divide the sequence has that position; see `TensorParallel.total` for what is
    communicated, (B, H).
    """

    def __init__(self, config: EncoderConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        size = config.hidden_size
        self.dense = ReplicatedLinear(size, size, tp, std=config.init_std, bias=True, enter=_identity)

    def forward(self, hidden: Tensor) -> Tensor:
        first = state_at(hidden, torch.zeros(hidden.shape[1], dtype=torch.int64, device=hidden.device), self.tp)
        return torch.tanh(self.dense(first))


class NextSentenceHead(nn.Module):
    """(S, B, H) -> (B, 2): scores that the second segment follows the first, and that it does not."""

    def __init__(self, config: EncoderConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.pooler = Pooler(config, tp)
        std = config.init_std
        self.out = ReplicatedLinear(config.hidden_size, 2, tp, std=std, bias=True, enter=_identity, is_output=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.pooler(hidden))


class MaskedLMHead(LanguageModelHead):
    """Losses of masked tokens and, where the model has the head, of whether the second segment follows the first.

    The transformation before the vocabulary projection, if there is one, runs on each rank's part of the sequence
    under sequence parallelism, else on all tensor ranks alike.
    """

    def __init__(self, config: EncoderConfig, ctx: BuildContext) -> None:
        size, std = config.embedding_size, config.init_std
        super().__init__(config.vocab_size, size, ctx, std=std, bias=config.head_bias)
        self.activation = None
        if config.head_activation is not None:
            bias = config.head_transform_bias
            self.transform = ReplicatedLinear(config.hidden_size, size, ctx.tp, std=std, bias=bias)
            self.activation = ACTIVATIONS[config.head_activation]
            self.norm = Norm(size, config.norm, ctx.tp)
        self.next_sentence = NextSentenceHead(config, ctx.tp) if config.next_sentence else None

    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> HeadResult:
        """`targets`, summed over the masked tokens; with the head `next_sentence_label`, over the sequences."""
        masked = super().losses({HIDDEN: self._transformed(activations)}, labels)
        if self.next_sentence is None:
            return masked
        scores, follows = self.next_sentence(activations[HIDDEN]).float(), labels["next_sentence_label"]
        loss = F.cross_entropy(scores, follows, ignore_index=IGNORE_INDEX, reduction="sum")
        return HeadResult({**masked.terms, "next_sentence_label": loss})

    def outputs(self, activations: Activations) -> Activations:
        """Return `logits` (B, S, V) and, with the head, `next_sentence` (B, 2)."""
        found = super().outputs({HIDDEN: self._transformed(activations)})
        if self.next_sentence is not None:
            found["next_sentence"] = self.next_sentence(activations[HIDDEN])
        return found

    def _transformed(self, activations: Activations) -> Tensor:
        if self.activation is None:
            return activations[HIDDEN]
        return self.norm(self.activation(self.transform(activations[HIDDEN])))


def encoder_layers(config: EncoderConfig, ctx: BuildContext) -> list[LayerSpec]:
    """Return the specs of an encoder's layers.

    A batch has `input_ids` and may have an `attention_mask` and `token_type_ids`. Labels are `targets`, the original
    token of masked positions, and `next_sentence_label`, 0 where the second segment follows the first.
    """
    vocab, width, std = config.vocab_size, config.embedding_size, config.init_std
    embed = partial(
        WordEmbedding, "input_ids", vocab, width, ctx.tp, std=std, padding_id=config.padding_id, keeps_ids=True
    )
    columns = ("input_ids", *MASKS, *(("token_type_ids",) if config.num_token_types else ()))
    hidden = LayerSpec("", nn.Identity, columns=MASKS)
    last = [replace(hidden, name="exit", build=partial(EncoderExit, config, ctx))] if config.final_norm else []
    return [
        LayerSpec("embedding", embed, hidden={}, columns=columns),
        replace(hidden, name="entry", build=partial(EncoderEntry, config, ctx), columns=columns),
        *block_layers("blocks", config, ctx, hidden, BlockInputs()),
        *last,
        _head(config, ctx),
    ]


def _head(config: EncoderConfig, ctx: BuildContext) -> LayerSpec:
    if config.labels is not None:
        return label_layer(config.labels, config.hidden_size, ctx, LayerSpec("", nn.Identity))
    if not config.masked_lm:
        pooler = partial(Pooler, config, ctx.tp) if config.pooler else None
        return hidden_layer(ctx.tp, LayerSpec("", nn.Identity), pooler=pooler, pooling=config.pooling)
    labels = ("targets", "next_sentence_label") if config.next_sentence else ("targets",)
    return LayerSpec(
        "head",
        partial(MaskedLMHead, config, ctx),
        head=HeadSpec.per_column(*labels),
        cost=float(config.embedding_size * (config.vocab_size + config.hidden_size)),
        tied={"weight": "embedding.weight"} if config.tied else {},
    )


def _identity(parameter: Tensor) -> Tensor:
    return parameter
