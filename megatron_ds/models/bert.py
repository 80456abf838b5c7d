"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019) as a list of layers: embedding, entry, blocks, head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.embedding import LearnedPositions, TokenTypes
from megatron_ds.layers.linear import ReplicatedLinear
from megatron_ds.layers.mlp import ACTIVATIONS
from megatron_ds.layers.norm import Norm
from megatron_ds.models.block import BlockInputs, block_layers
from megatron_ds.models.config import EncoderConfig
from megatron_ds.models.context import BuildContext
from megatron_ds.models.embedding_and_head import LanguageModelHead, WordEmbedding
from megatron_ds.models.sequential import HIDDEN, Activations, HeadResult, HeadSpec, LayerSpec, OutputHead
from megatron_ds.parallel.collectives import gather_sequence, reduce_from
from megatron_ds.parallel.tensor import TensorParallel


class Entry(nn.Module):
    """Layer between the word embedding and the first block: learned positions, segments, a norm, dropout.

    (S, B, H) -> the same, or this rank's part of the sequence.
    """

    def __init__(self, config: EncoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        hidden, std = config.hidden_size, config.init_std
        self.table = config.positions
        self.positions = LearnedPositions(config.positions, hidden, ctx.tp, std=std)
        self.token_types = TokenTypes(config.num_token_types, hidden, ctx.tp, std=std)
        self.norm = Norm(hidden, config.norm, ctx.tp)
        self.dropout = HiddenDropout(config.embedding_dropout, ctx.rng, ctx.tp.splits_sequence)

    def forward(self, activations: Activations) -> Activations:
        padding = self.table.skipped_id
        seen = activations["input_ids"] != padding if padding is not None else None
        hidden = self.positions(self.token_types(activations[HIDDEN], activations.get("token_type_ids")), seen)
        rest = {name: activations[name] for name in ("attention_mask",) if name in activations}
        return {**rest, HIDDEN: self.dropout(self.norm(hidden))}


class Pooler(nn.Module):
    """Projection of the first position's state to a vector a sequence: (S, B, H) -> (B, H), equal on all tensor ranks.

    Under sequence parallelism the first of them has that position: forward all-reduce of (B, H) over the tensor axis,
    backward nothing.
    """

    def __init__(self, config: EncoderConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        size = config.hidden_size
        self.dense = ReplicatedLinear(size, size, tp, std=config.init_std, bias=True, enter=_identity)

    def forward(self, hidden: Tensor) -> Tensor:
        first = hidden[0]
        if self.tp.splits_sequence:
            first = reduce_from(first if self.tp.axis.rank == 0 else first * 0.0, self.tp.axis)
        return torch.tanh(self.dense(first))


class NextSentenceHead(nn.Module):
    """(S, B, H) -> (B, 2): scores that the second segment follows the first, and that it does not."""

    def __init__(self, config: EncoderConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.pooler = Pooler(config, tp)
        self.out = ReplicatedLinear(config.hidden_size, 2, tp, std=config.init_std, bias=True, enter=_identity)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.pooler(hidden))


class MaskedLMHead(LanguageModelHead):
    """Losses of masked tokens and, where the model has the head, of whether the second segment follows the first.

    The transformation before the vocabulary projection runs on each rank's part of the sequence under sequence
    parallelism, else on all tensor ranks alike.
    """

    def __init__(self, config: EncoderConfig, ctx: BuildContext) -> None:
        size, std = config.hidden_size, config.init_std
        super().__init__(config.vocab_size, size, ctx, std=std, bias=True)
        self.transform = ReplicatedLinear(size, size, ctx.tp, std=std, bias=True)
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
        return self.norm(self.activation(self.transform(activations[HIDDEN])))


class EncoderOutput(OutputHead):
    """Output of an encoder without a head, which has no loss of its own.

    It takes directions in the place of labels: the gradient of the inner product with them is a vector-Jacobian
    product, by which any gradient of the encoder can be checked.
    """

    def __init__(self, config: EncoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.tp = ctx.tp
        self.pooler = Pooler(config, ctx.tp) if config.pooler else None

    def losses(self, activations: Activations, labels: Mapping[str, Tensor]) -> HeadResult:
        """Inner products with `hidden_direction` (B, S, H) and, with a pooler, `pooled_direction` (B, H)."""
        hidden = activations[HIDDEN]
        along = labels["hidden_direction"].transpose(0, 1)[self.tp.sequence_slice(self._length(hidden))]
        total = (hidden.float() * along).sum()
        if self.tp.splits_sequence:
            total = reduce_from(total, self.tp.axis)
        if self.pooler is None:
            return HeadResult({"hidden_direction": total})
        pooled = (self.pooler(hidden).float() * labels["pooled_direction"]).sum()
        return HeadResult({"hidden_direction": total, "pooled_direction": pooled})

    def outputs(self, activations: Activations) -> Activations:
        """Return `hidden` (B, S, H) and, with a pooler, `pooled` (B, H)."""
        hidden = activations[HIDDEN]
        whole = gather_sequence(hidden, self.tp.axis) if self.tp.splits_sequence else hidden
        pooled = {"pooled": self.pooler(hidden)} if self.pooler is not None else {}
        return {"hidden": whole.transpose(0, 1), **pooled}

    def _length(self, hidden: Tensor) -> int:
        return hidden.shape[0] * (self.tp.axis.size if self.tp.splits_sequence else 1)


def encoder_layers(config: EncoderConfig, ctx: BuildContext | None = None) -> list[LayerSpec]:
    """Return the specs of an encoder's layers.

    A batch has `input_ids` and may have an `attention_mask` and `token_type_ids`. Labels are `targets`, the original
    token of masked positions, and `next_sentence_label`, 0 where the second segment follows the first.
    """
    ctx = ctx or BuildContext()
    vocab, size, std = config.vocab_size, config.hidden_size, config.init_std
    embed = partial(
        WordEmbedding, "input_ids", vocab, size, ctx.tp, std=std, padding_id=config.padding_id, keeps_ids=True
    )
    columns = ("input_ids", "attention_mask", "token_type_ids")
    hidden = LayerSpec("", nn.Identity, columns=("attention_mask",))
    return [
        LayerSpec("embedding", embed, hidden={}, columns=columns),
        replace(hidden, name="entry", build=partial(Entry, config, ctx), columns=columns),
        *block_layers("blocks", config, ctx, hidden, BlockInputs()),
        _head(config, ctx),
    ]


def _head(config: EncoderConfig, ctx: BuildContext) -> LayerSpec:
    if not config.masked_lm:
        labels = ("hidden_direction", "pooled_direction") if config.pooler else ("hidden_direction",)
        return LayerSpec("head", partial(EncoderOutput, config, ctx), head=HeadSpec(labels, labels, _count_numbers))
    labels = ("targets", "next_sentence_label") if config.next_sentence else ("targets",)
    return LayerSpec(
        "head",
        partial(MaskedLMHead, config, ctx),
        head=HeadSpec.per_column(*labels),
        cost=float(config.hidden_size * (config.vocab_size + config.hidden_size)),
        tied={"weight": "embedding.weight"},
    )


def _count_numbers(directions: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor([column.numel() for column in directions.values()], dtype=torch.int64)


def _identity(parameter: Tensor) -> Tensor:
    return parameter
