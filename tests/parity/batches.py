"""Batches of each kind of model, as transformers takes them and as ours does."""

from typing import Any

import torch
from torch import Tensor

from tests.parity.cases import SEQ, VOCAB, Recipe, global_batch, shifted
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.packed import draw_rows, unpacked

TARGETS = 24  # a multiple of every tensor size, other than SEQ
PADDING = 1  # RoBERTa's positions skip it
ENCODER_DECODERS = ("t5", "mt5")
ENCODERS = {config["model_type"] for config in ENCODER_CASES.values()} - set(ENCODER_DECODERS)


def batch_for(model_type: str, recipe: Recipe, step: int) -> dict[str, Tensor]:
    """A global batch in transformers' words, with padding and uneven labels; (G, ...) each."""
    if model_type in ENCODERS:
        return encoder_batch(recipe, step, pairs=model_type == "bert")
    if model_type in ENCODER_DECODERS:
        return encoder_decoder_batch(recipe, step)
    if recipe.packed:
        return unpacked(draw_rows(recipe.global_batch, step, recipe.length))
    return global_batch(recipe, step)


def encoder_batch(recipe: Recipe, step: int, *, pairs: bool) -> dict[str, Tensor]:
    """Masked tokens: some rows have many, one has none. Where `pairs`, segments and whether the second follows."""
    generator = torch.Generator().manual_seed(2000 + step)
    ids, mask = _padded(recipe.global_batch, recipe.length, generator)
    labels = ids.clone()
    for row in range(recipe.global_batch):
        masked = torch.rand(recipe.length, generator=generator) < 0.1 * (1 + row % 5)
        labels[row, ~masked] = -100
    labels[3] = -100
    labels[mask == 0] = -100
    ids[labels != -100] = 2
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if pairs:
        begins = torch.arange(recipe.global_batch)[:, None] * 2 + 5
        batch["token_type_ids"] = (torch.arange(recipe.length)[None] >= begins).long() * mask
        batch["next_sentence_label"] = torch.randint(0, 2, (recipe.global_batch,), generator=generator)
        batch["next_sentence_label"][(step * 3 + 1) % recipe.global_batch] = -100
    return batch


def encoder_decoder_batch(recipe: Recipe, step: int) -> dict[str, Tensor]:
    """Inputs of uneven length and targets of another; one row has no targets."""
    generator = torch.Generator().manual_seed(3000 + step)
    ids, mask = _padded(recipe.global_batch, recipe.length, generator)
    targets = TARGETS - SEQ + recipe.length
    labels = torch.randint(2, VOCAB, (recipe.global_batch, targets), generator=generator)
    for row in range(recipe.global_batch):
        labels[row, targets - (row * 5 + step) % 17 :] = -100
    labels[3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _padded(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row * 7 % 13 :] = 0
    return ids.masked_fill(mask == 0, PADDING), mask


def ours(model_type: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in our columns."""
    columns = dict(batch)
    labels = columns.pop("labels")
    if model_type not in (*ENCODERS, *ENCODER_DECODERS):
        columns["targets"] = shifted(labels)
    else:
        columns["targets"] = labels
    if model_type in ENCODER_DECODERS:
        columns["decoder_input_ids"] = shifted_right(labels)
    return {name: column.bool() if name == "attention_mask" else column for name, column in columns.items()}


def shifted_right(labels: Tensor) -> Tensor:
    """What T5's decoder reads: its start, then the labels up to the last."""
    begin = torch.zeros_like(labels[:, :1])
    return torch.cat([begin, labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)], dim=1)


def reference_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Written out from transformers' logits: each term's sum over its labels, divided by their number."""
    kind = model.config.model_type
    inputs = {name: column for name, column in batch.items() if name not in ("labels", "next_sentence_label")}
    labels = batch["labels"]
    if kind in ENCODER_DECODERS:
        # position_ids are left at 0..S-1, as a training loop without generation does
        return _mean(model(**inputs, decoder_input_ids=shifted_right(labels)).logits, labels)
    found = model(**inputs)
    if kind not in ENCODERS:
        return _mean(found.logits[:, :-1], labels[:, 1:])
    if not hasattr(found, "prediction_logits"):
        return _mean(found.logits, labels)
    return _mean(found.prediction_logits, labels) + _mean(found.seq_relationship_logits, batch["next_sentence_label"])


def _mean(logits: Tensor, labels: Tensor) -> Tensor:
    flat = logits.float().flatten(0, -2), labels.flatten()
    loss = torch.nn.functional.cross_entropy(*flat, ignore_index=-100, reduction="sum")
    return loss / (labels != -100).sum()
