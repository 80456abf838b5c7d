"""Samples as text, with what of them carries loss: so that a person can see what a model is trained on."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.data.dataset import IGNORE_INDEX, Dataset, Sample
from megatron_ds.data.sampler import GlobalBatches

PAD_ID = 0  # what causal samples are filled up with


@dataclass(frozen=True)
class Piece:
    """A stretch of text, all of it under loss or none of it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Document:
    """Tokens that see one another.

    Attributes:
        name: such as `input`; empty where a number says enough.
        tokens: how many, those that are not shown included.
        learned: how many of them are to be predicted.
        pieces: the text; ids where there is no tokenizer.
        hidden: how many tokens at the end are not shown.
    """

    name: str
    tokens: int
    learned: int
    pieces: tuple[Piece, ...]
    hidden: int = 0


@dataclass(frozen=True)
class ShownSample:
    """A sample.

    Attributes:
        index: in the data, of whichever epoch.
        documents: in it.
        padding: positions that hold nothing.
    """

    index: int
    documents: tuple[Document, ...]
    padding: int = 0


Tokens = tuple[np.ndarray, np.ndarray]
"""Ids (L,) and which of them are to be predicted, (L,) bool."""


def first_samples(data: Dataset, order: GlobalBatches, number: int) -> Iterator[tuple[int, Sample]]:
    """The samples that a run takes first, and their indices in the data."""
    for start in range(0, number, order.global_batch_size):
        for index in order.indices_from(start)[: number - start].tolist():
            yield index % len(data), data.sample(index)


def show_sample(index: int, sample: Sample, tokenizer: PreTrainedTokenizerBase | None, shifted: bool) -> ShownSample:
    """What a sample holds.

    Args:
        index: of the sample.
        sample: as a dataset gives it.
        tokenizer: None = ids are shown.
        shifted: whether position t predicts token t + 1, as in a causal model; else targets stand in their own places.
    """
    if "decoder_input_ids" in sample:
        targets = sample["targets"]
        inputs, padding = _without_padding(sample, sample["input_ids"], np.zeros(len(sample["input_ids"]), dtype=bool))
        written = targets[targets != IGNORE_INDEX]
        documents = [
            show(inputs, tokenizer, "input"),
            show((written, np.ones(len(written), dtype=bool)), tokenizer, "target"),
        ]
        return ShownSample(index, tuple(documents), padding)
    tokens, padding = _without_padding(sample, *(_shifted(sample) if shifted else _in_place(sample)))
    positions = sample.get("position_ids")
    starts = [0] if positions is None else np.flatnonzero(positions[: len(tokens[0])] == 0).tolist()
    bounds = zip(starts, [*starts[1:], len(tokens[0])])
    parts = [(tokens[0][start:stop], tokens[1][start:stop]) for start, stop in bounds]
    return ShownSample(index, tuple(show(part, tokenizer) for part in parts), padding)


def show(
    tokens: Tokens, tokenizer: PreTrainedTokenizerBase | None, name: str = "", most: int | None = None
) -> Document:
    """A document of at most `most` tokens' text."""
    ids, learned = tokens
    shown = len(ids) if most is None else min(len(ids), most)
    pieces = pieces_of(ids[:shown], learned[:shown], tokenizer)
    return Document(name, len(ids), int(learned.sum()), pieces, len(ids) - shown)


def pieces_of(ids: np.ndarray, learned: np.ndarray, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Piece, ...]:
    """Text cut where loss begins and ends.

    A tokenizer may put a space between two tokens, or make one character of them: each cut lies where the text of all
    tokens before it ends.
    """
    if len(ids) == 0:
        return ()
    cuts = [*(np.flatnonzero(learned[1:] != learned[:-1]) + 1).tolist(), len(ids)]
    if tokenizer is None:
        return tuple(
            Piece(" ".join(map(str, ids[start:stop])) + (" " if stop < len(ids) else ""), bool(learned[start]))
            for start, stop in zip([0, *cuts[:-1]], cuts)
        )
    whole = _decode(ids, tokenizer)
    ends = [_agreement(whole, _decode(ids[:cut], tokenizer)) for cut in cuts[:-1]] + [len(whole)]
    starts = zip([0, *ends[:-1]], ends, [0, *cuts[:-1]])
    return tuple(Piece(whole[start:end], bool(learned[first])) for start, end, first in starts)


def learned_of(sample: Sample) -> int:
    """Labels of a sample that carry loss."""
    return int((sample["targets"] != IGNORE_INDEX).sum())


def length_of(sample: Sample) -> int:
    """Input positions that are no padding."""
    _, padding = _without_padding(sample, *_shifted(sample))
    return len(sample["input_ids"]) - padding


def _decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), type(text)
    return text


def _agreement(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _shifted(sample: Sample) -> Tokens:
    """The inputs and, where there is one, the last target, which is no input: (S,) or (S + 1,)."""
    ids, targets = sample["input_ids"], sample["targets"]
    if len(ids) != len(targets):
        return ids, np.zeros(len(ids), dtype=bool)
    learned = np.concatenate([[False], targets != IGNORE_INDEX])
    tokens = np.concatenate([ids, [PAD_ID]])
    tokens[learned] = targets[learned[1:]]
    end = len(tokens) if learned[-1] else len(ids)
    return tokens[:end], learned[:end]


def _in_place(sample: Sample) -> Tokens:
    """What is to be predicted stands in the place of what hides it."""
    learned = sample["targets"] != IGNORE_INDEX
    return np.where(learned, sample["targets"], sample["input_ids"]), learned


def _without_padding(sample: Sample, ids: np.ndarray, learned: np.ndarray) -> tuple[Tokens, int]:
    """The tokens before the padding, and its length. Where nothing says what it is, it is what ends in PAD_ID alone."""
    size = len(sample["input_ids"])
    if len(ids) > size:
        return (ids, learned), 0
    if "attention_mask" in sample:
        held = sample["attention_mask"] | learned
    else:
        held = (ids != PAD_ID) | learned
    end = int(np.flatnonzero(held)[-1]) + 1 if held.any() else 0
    if "position_ids" in sample:  # padding is a document of its own
        last = int(np.flatnonzero(sample["position_ids"] == 0)[-1])
        end = size if end > last else last
    return (ids[:end], learned[:end]), size - end
