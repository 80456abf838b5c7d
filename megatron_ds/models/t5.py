"""T5 (Raffel et al. 2020), from v1.0 to Flan: the layers of an encoder, those of a decoder, and a head.

All blocks of the decoder attend to the encoder's states, which pass through the pipeline with the decoder's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from megatron_ds.config import ModelShape
from megatron_ds.layers.cross_entropy import LogitFinish
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.norm import Norm
from megatron_ds.models.block import BlockInputs, block_layers
from megatron_ds.models.config import Decoding, ModelConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.embedding_and_head import LanguageModelHead, WordEmbedding
from megatron_ds.models.label_head import label_layer, probe_labels
from megatron_ds.models.probe import (
    BEYOND,
    DECODER_LENGTH,
    MOST_TOKENS,
    RANDOM_LENGTH,
    ROWS,
    Probe,
    fitting_length,
    random_ids,
    right_padded,
    some_labels,
)
from megatron_ds.models.sequential import HIDDEN, Activations, HeadSpec, LayerSpec
from megatron_ds.models.stack import StackConfig

ENCODED = "encoded"


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(ModelConfig):
    """Two stacks, of which the second attends to the first (Raffel et al. 2020), over one word embedding.

    Attributes:
        encoder, decoder: the stacks, of one width; each ends with a norm.
        logit_multiplier: of the logits.
        embedding_dropout: probability, on word embeddings and on the output of each stack.
        embedding_std, head_std: standard deviations at initialisation, of the embedding and of an untied head.
        decoder_start_id: the decoder's first input.
        padding_id: id at positions without a token.
    """

    encoder: StackConfig
    decoder: StackConfig
    logit_multiplier: float = 1.0
    embedding_dropout: float = 0.0
    embedding_std: float
    head_std: float
    decoder_start_id: int
    padding_id: int

    def __post_init__(self) -> None:
        assert self.encoder.hidden_size == self.decoder.hidden_size, "the decoder attends to states of its own width"
        assert self.decoder.cross_attention and not self.encoder.cross_attention

    @property
    def hidden_size(self) -> int:
        """H, of both stacks."""
        return self.encoder.hidden_size

    @property
    def stacks(self) -> dict[str, StackConfig]:
        return {"encoder.blocks": self.encoder, "decoder.blocks": self.decoder}

    @property
    def decoding(self) -> Decoding | None:
        if self.labels is not None:
            return None
        return Decoding("decoder_input_ids", "decoder.embedding", self.decoder_start_id)

    @property
    def task_type(self) -> str | None:
        return "SEQ_2_SEQ_LM" if self.labels is None else super().task_type

    @property
    def data_objective(self) -> str:
        return "seq2seq" if self.labels is None else "labelled"

    @property
    def data_objective_options(self) -> dict[str, Any]:
        if self.labels is not None:
            return self.label_options(self.padding_id)
        return {"decoder_start_id": self.decoder_start_id, "padding_id": self.padding_id}

    def shape(self) -> ModelShape:
        shape = self.encoder.model_shape(self.encoder.num_layers + self.decoder.num_layers, self.vocab_size, None)
        return replace(shape, causal=self.decoder.causal)

    def axis_sizes(self) -> dict[str, int]:
        labels = {"y": self.labels.num_labels} if self.labels is not None else {}
        return {**self.encoder.axis_sizes(), "v": self.vocab_size, "e": self.hidden_size, **labels}

    def build_layers(self, ctx: BuildContext | None = None) -> list[LayerSpec]:
        return encoder_decoder_layers(self, ctx or BuildContext())

    @property
    def num_idle_params(self) -> int:
        return self.encoder.num_idle_params + self.decoder.num_idle_params

    def flops_per_position(self, seq_length: int, target_length: int, num_params: int, num_frozen: int) -> float:
        """Count 6 for each multiplication of a forward pass, of projections and attention alike, as if none were
        frozen."""
        decoded = target_length if self.labels is None else seq_length  # with a head for labels it reads the text too
        multiplications = self.vocab_size * self.hidden_size * decoded if self.labels is None else 0
        multiplications += _multiplications(self.encoder, seq_length, 0)
        multiplications += _multiplications(self.decoder, decoded, seq_length)
        return 6.0 * multiplications / (seq_length + target_length)

    def without_dropout(self) -> Self:
        encoder, decoder = self.encoder.without_dropout(), self.decoder.without_dropout()
        labels = self.labels.without_dropout() if self.labels is not None else None
        return replace(self, encoder=encoder, decoder=decoder, embedding_dropout=0.0, labels=labels)

    def probes(self, multiple_of: int) -> tuple[list[Probe], str | None]:
        """Ids behind padding in both stacks; and sequences beyond the distance from which on all share one bias."""
        if self.labels is not None:
            return self._label_probes(multiple_of), None
        length, decoder_length = (
            fitting_length(wanted, multiple_of, MOST_TOKENS) for wanted in (RANDOM_LENGTH, DECODER_LENGTH)
        )
        found = [self._probe("padded", ROWS, length, decoder_length, padded=True)]
        edge = max(stack.relative.max_distance for stack in self.stacks.values() if stack.relative is not None)
        if edge < decoder_length - BEYOND:
            return found, None
        if edge + 2 * BEYOND > MOST_TOKENS:
            return found, f"distances of {edge:,} tokens are longer than any input"
        beyond, decoder_beyond = (
            fitting_length(edge + more, multiple_of, MOST_TOKENS) for more in (2 * BEYOND, BEYOND)
        )
        found.append(self._probe("past the last distance", 1, beyond, decoder_beyond, padded=False))
        return found, None

    def _label_probes(self, multiple_of: int) -> list[Probe]:
        """Texts of several lengths with one end each, and one text without padding whose end is in its middle."""
        length = fitting_length(RANDOM_LENGTH, multiple_of, MOST_TOKENS)
        assert self.labels is not None and self.labels.pick_id is not None
        padded = Probe("padded", *self._texts(right_padded(ROWS, length)), with_gradients=True)
        return [padded, Probe("bare", *self._texts(torch.ones(1, length, dtype=torch.bool)), with_gradients=False)]

    def _texts(self, seen: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return columns and labels of texts with tokens where `seen` (B, S): the last one is the end."""
        assert self.labels is not None and self.labels.pick_id is not None
        (batch, length), end = seen.shape, self.labels.pick_id
        ids = random_ids(self.vocab_size, batch, length)
        ids[ids == end] = (end + 1) % self.vocab_size
        lengths = seen.sum(1) if batch > 1 else torch.tensor([length // 2])
        ids[torch.arange(batch), lengths - 1] = end
        ids.masked_fill_(~seen, self.padding_id)
        columns = {"input_ids": ids, "attention_mask": seen} if batch > 1 else {"input_ids": ids}
        return columns, probe_labels(self.labels, seen)

    def _probe(self, name: str, batch: int, length: int, decoder_length: int, *, padded: bool) -> Probe:
        """Random ids in both stacks and random labels; gradients are made where it is padded."""
        columns = {
            "input_ids": random_ids(self.vocab_size, batch, length),
            "decoder_input_ids": random_ids(self.vocab_size, batch, decoder_length, seed=1),
        }
        columns["decoder_input_ids"][:, 0] = self.decoder_start_id
        seen = torch.ones(batch, decoder_length, dtype=torch.bool)
        if padded:
            seen = right_padded(batch, decoder_length).flip(0)  # another row is full than in the encoder
            columns["attention_mask"] = right_padded(batch, length)
            columns["decoder_attention_mask"] = seen
            columns["input_ids"].masked_fill_(~columns["attention_mask"], self.padding_id)
            columns["decoder_input_ids"].masked_fill_(~seen, self.padding_id)
        labels = {"targets": some_labels(random_ids(self.vocab_size, batch, decoder_length, seed=4), seen)}
        return Probe(name, columns, labels, with_gradients=padded)


def _multiplications(stack: StackConfig, positions: int, context: int) -> int:
    """Multiplications of one sample's forward pass through a stack that may attend to `context` positions."""
    total = 0
    for layer in range(stack.num_layers):
        attention, cross = stack.attention(layer), stack.cross(layer)
        total += (attention.cost + stack.feed_forward(layer).cost) * positions
        total += 2 * attention.width * positions * positions
        if cross is not None:
            total += (cross.cost - cross.kv_cost) * positions + cross.kv_cost * context
            total += 2 * cross.width * positions * context
    return total


class ShiftedEmbedding(WordEmbedding):
    """Embed the decoder's inputs, which are `input_ids` shifted right by one behind the start id.

    (B, S) -> (S, B, H), or (S/t, B, H) under sequence parallelism; the ids stay among the activations.
    """

    def __init__(self, config: EncoderDecoderConfig, ctx: BuildContext) -> None:
        super().__init__("decoder_input_ids", config.vocab_size, config.hidden_size, ctx.tp, std=config.embedding_std)
        self.start_id = config.decoder_start_id

    def forward(self, activations: Activations) -> Activations:  # type: ignore[override]
        ids = activations["input_ids"]
        shifted = torch.cat([torch.full_like(ids[:, :1], self.start_id), ids[:, :-1]], dim=1)
        return super().forward({**activations, self.column: shifted})


class StackEntry(nn.Module):
    """The step between word embedding and first block of a stack: dropout, without positions.

    (S, B, H) -> (S, B, H), with S/t under sequence parallelism.
    """

    def __init__(self, config: EncoderDecoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.dropout = HiddenDropout(config.embedding_dropout, ctx.rng, ctx.tp.splits_sequence)

    def forward(self, activations: Activations) -> Activations:
        return {**activations, HIDDEN: self.dropout(activations[HIDDEN])}


class StackExit(nn.Module):
    """The steps after the last block of a stack: a norm and dropout.

    (S, B, H) -> (S, B, H), with S/t under sequence parallelism.

    Args:
        config: of the model.
        stack: of the stack.
        ctx: parallel axes and random streams.
        name: name of the stack's hidden states from here on.
    """

    def __init__(self, config: EncoderDecoderConfig, stack: StackConfig, ctx: BuildContext, name: str) -> None:
        super().__init__()
        self.name = name
        self.norm = Norm(stack.hidden_size, stack.norm, ctx.tp)
        self.dropout = HiddenDropout(config.embedding_dropout, ctx.rng, ctx.tp.splits_sequence)

    def forward(self, activations: Activations) -> Activations:
        rest = {name: tensor for name, tensor in activations.items() if name != HIDDEN}
        return {**rest, self.name: self.dropout(self.norm(activations[HIDDEN]))}


def encoder_decoder_layers(config: EncoderDecoderConfig, ctx: BuildContext) -> list[LayerSpec]:
    """Return the layers of an encoder-decoder, not built yet.

    A batch has `input_ids` and `decoder_input_ids`, and may have a mask of each. The label column is `targets`: the id
    after each of the decoder's positions. With a head for labels the decoder's inputs are `input_ids` too.
    """
    vocab, width, std = config.vocab_size, config.hidden_size, config.embedding_std
    shifts = config.labels is not None
    inputs = "input_ids" if shifts else "decoder_input_ids"
    masks, later = ("attention_mask", "decoder_attention_mask"), (inputs,)
    encoding = LayerSpec("", nn.Identity, columns=(*masks, *later))
    both = {HIDDEN: inputs, ENCODED: "input_ids"}
    decoding = LayerSpec("", nn.Identity, hidden=both, columns=(*masks, *later) if shifts else masks)
    across = BlockInputs("decoder_attention_mask", ENCODED, "attention_mask")
    shared = {"weight": "embedding.weight"}

    def embed(column: str) -> Callable[[], nn.Module]:
        return partial(WordEmbedding, column, vocab, width, ctx.tp, std=std, keeps_ids=shifts)

    return [
        LayerSpec(
            "embedding", embed("input_ids"), hidden={}, columns=tuple(dict.fromkeys(("input_ids", *masks, *later)))
        ),
        replace(encoding, name="encoder.entry", build=partial(StackEntry, config, ctx)),
        *block_layers("encoder.blocks", config.encoder, ctx, encoding, BlockInputs()),
        replace(encoding, name="encoder.exit", build=partial(StackExit, config, config.encoder, ctx, ENCODED)),
        replace(
            encoding,
            name="decoder.embedding",
            build=partial(ShiftedEmbedding, config, ctx) if shifts else embed("decoder_input_ids"),
            hidden={ENCODED: "input_ids"},
            tied=shared,
        ),
        replace(decoding, name="decoder.entry", build=partial(StackEntry, config, ctx)),
        *block_layers("decoder.blocks", config.decoder, ctx, decoding, across),
        replace(decoding, name="decoder.exit", build=partial(StackExit, config, config.decoder, ctx, HIDDEN)),
        _head(config, ctx, decoding),
    ]


def _head(config: EncoderDecoderConfig, ctx: BuildContext, like: LayerSpec) -> LayerSpec:
    if config.labels is not None:
        return label_layer(config.labels, config.hidden_size, ctx, like)
    vocab, width, finish = config.vocab_size, config.hidden_size, LogitFinish(config.logit_multiplier)
    return replace(
        like,
        name="head",
        build=partial(LanguageModelHead, vocab, width, ctx, std=config.head_std, finish=finish),
        columns=(),
        head=HeadSpec.per_column("targets"),
        cost=float(vocab * width),
        tied={"weight": "embedding.weight"} if config.tied else {},
    )
