"""Batches for one process beside another: bare, and behind padding; ids of every case's padding stand among the others,
as their rows of the embedding do not learn as inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_ds.models.bert import EncoderConfig
from megatron_ds.models.config import ModelConfig
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.t5 import EncoderDecoderConfig
from tests.parity.cases import SEQ, VOCAB, shifted

BATCH = 3
TARGETS = 20  # of an encoder-decoder: another length than the inputs'
PADDING = (0, 5, 11)  # positions of the rows


@dataclass(frozen=True)
class Batch:
    """Columns and labels as ours take them; `compared` (B, S) or None = all: where outputs mean something."""

    columns: dict[str, Tensor]
    labels: dict[str, Tensor]
    compared: Tensor | None = None

    def without(self, column: str) -> Batch:
        return replace(self, columns={name: tensor for name, tensor in self.columns.items() if name != column})


def make_batch(core: ModelConfig, *, padded: bool) -> Batch:
    """The batch of a kind of model."""
    if isinstance(core, DecoderConfig):
        return _causal(padded)
    return _encoder(core, padded) if isinstance(core, EncoderConfig) else _encoder_decoder(core, padded)


def _causal(padded: bool) -> Batch:
    """Padding on the left: the side that a causal mask alone gets wrong."""
    ids = _ids(SEQ)
    labels = ids.clone()
    labels[0, :9] = -100
    if not padded:
        return Batch({"input_ids": ids}, {"targets": shifted(labels)})
    mask = torch.ones_like(ids, dtype=torch.bool)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = False
        labels[row, : padding + 1] = -100  # a position of padding predicts nothing
    return Batch({"input_ids": ids, "attention_mask": mask}, {"targets": shifted(labels)}, mask)


def _encoder(core: EncoderConfig, padded: bool) -> Batch:
    """Segments too, where there are several, and labels of another number in each row."""
    generator = torch.Generator().manual_seed(97)
    columns, mask = {"input_ids": _ids(SEQ)}, _right_padded(SEQ)
    if padded:
        columns["attention_mask"] = mask
        columns["input_ids"].masked_fill_(~mask, core.padding_id or 0)
    if padded and core.num_token_types > 1:
        columns["token_type_ids"] = torch.randint(0, core.num_token_types, (BATCH, SEQ), generator=generator)
    compared = mask if padded and any(core.windows) else None  # padding may see no token, in a window
    if not core.masked_lm:
        labels = {"hidden_direction": torch.randn(BATCH, SEQ, core.hidden_size, generator=generator)}
        if compared is not None:
            labels["hidden_direction"] *= compared[..., None]
        if core.pooler:
            labels["pooled_direction"] = torch.randn(BATCH, core.hidden_size, generator=generator)
        return Batch(columns, labels, compared)
    labels = {"targets": _uneven(SEQ).masked_fill(~mask, -100)}
    if core.next_sentence:
        labels["next_sentence_label"] = torch.tensor([1, 0, -100])
    return Batch(columns, labels, compared)


def _encoder_decoder(core: EncoderDecoderConfig, padded: bool) -> Batch:
    columns = {"input_ids": _ids(SEQ), "decoder_input_ids": _ids(TARGETS).flip(1)}
    targets, mask, decoder_mask = _uneven(TARGETS), _right_padded(SEQ), _right_padded(TARGETS).flip(0)
    if padded:
        columns["attention_mask"], columns["decoder_attention_mask"] = mask, decoder_mask
        columns["input_ids"].masked_fill_(~mask, core.padding_id)
        targets.masked_fill_(~decoder_mask, -100)
    return Batch(columns, {"targets": targets})


def _ids(length: int) -> Tensor:
    ids = torch.randint(0, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(99))
    ids[0, 12:20] = torch.arange(8)  # every case's padding id
    return ids


def _uneven(length: int) -> Tensor:
    """Labels of a third of the positions, of one row fewer."""
    generator = torch.Generator().manual_seed(98)
    labels = torch.randint(0, VOCAB, (BATCH, length), generator=generator)
    chosen = torch.rand(BATCH, length, generator=generator) < torch.tensor([0.4, 0.15, 0.4])[:, None]
    chosen[:, 1] = True
    return labels.masked_fill(~chosen, -100)


def _right_padded(length: int) -> Tensor:
    return torch.arange(length) < length - torch.tensor(PADDING)[:, None]
