"""Samples rendered as text with loss-bearing spans marked, to check by eye what a model is trained on."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.columns import INPUT_IDS, TARGETS
from megatron_ds.data.chat.turns import common_length
from megatron_ds.data.dataset import Dataset, Sample
from megatron_ds.data.sampler import GlobalBatches


@dataclass(frozen=True)
class TextPiece:
    """A stretch of text that carries loss as a whole (`learned`) or not at all."""

    text: str
    learned: bool


@dataclass(frozen=True)
class RenderedDocument:
    """Tokens that attend to one another, as text.

    Attributes:
        name: such as `input`; empty where a number is enough.
        tokens: number of tokens, hidden ones included.
        learned: number of tokens with loss.
        pieces: the text; ids where there is no tokenizer.
        hidden: number of tokens at the end that are left out.
    """

    name: str
    tokens: int
    learned: int
    pieces: tuple[TextPiece, ...]
    hidden: int = 0


@dataclass(frozen=True)
class RenderedSample:
    """A sample as text.

    Attributes:
        index: in the data, without epochs.
        documents: of the sample.
        padding: number of padding positions.
        label: of the sample, where it has one as a whole: its classes or scores.
    """

    index: int
    documents: tuple[RenderedDocument, ...]
    padding: int = 0
    label: str = ""


Tokens = tuple[np.ndarray, np.ndarray]
"""Ids (L,), and which of them carry loss, (L,) bool."""


def first_samples(data: Dataset, order: GlobalBatches, number: int) -> Iterator[tuple[int, Sample]]:
    """Yield the first samples of a run, with their indices in the data."""
    for start in range(0, number, order.global_batch_size):
        for index in order.indices_from(start)[: number - start].tolist():
            yield index % len(data), data.sample(index)


def render_sample(
    index: int, sample: Sample, tokenizer: PreTrainedTokenizerBase | None, shifted: bool
) -> RenderedSample:
    """Render a sample.

    Args:
        index: of the sample.
        sample: as a dataset returns it.
        tokenizer: None = ids instead of text.
        shifted: True if position t predicts token t + 1, as in causal models; False if targets are in place.
    """
    if "decoder_input_ids" in sample:
        targets = sample["targets"]
        inputs, padding = _without_padding(sample, sample["input_ids"], np.zeros(len(sample["input_ids"]), dtype=bool))
        written = targets[TARGETS.carries_loss(targets)]
        documents = [
            render(inputs, tokenizer, "input"),
            render((written, np.ones(len(written), dtype=bool)), tokenizer, "target"),
        ]
        return RenderedSample(index, tuple(documents), padding)
    tokens, padding = _without_padding(sample, *(_shifted(sample) if shifted else _in_place(sample)))
    positions = sample.get("position_ids")
    starts = [0] if positions is None else np.flatnonzero(positions[: len(tokens[0])] == 0).tolist()
    bounds = zip(starts, [*starts[1:], len(tokens[0])])
    parts = [(tokens[0][start:stop], tokens[1][start:stop]) for start, stop in bounds]
    return RenderedSample(index, tuple(render(part, tokenizer) for part in parts), padding)


def render(
    tokens: Tokens, tokenizer: PreTrainedTokenizerBase | None, name: str = "", most: int | None = None
) -> RenderedDocument:
    """Render a document; only the text of its first `most` tokens."""
    ids, learned = tokens
    kept = len(ids) if most is None else min(len(ids), most)
    pieces = split_by_loss(ids[:kept], learned[:kept], tokenizer)
    return RenderedDocument(name, len(ids), int(learned.sum()), pieces, len(ids) - kept)


def split_by_loss(
    ids: np.ndarray, learned: np.ndarray, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[TextPiece, ...]:
    """Decode tokens to text, cut where loss begins and ends.

    A tokenizer may put a space between two tokens, or decode several to one character: each cut is where the text of
    all tokens before it ends.
    """
    if len(ids) == 0:
        return ()
    cuts = [*(np.flatnonzero(learned[1:] != learned[:-1]) + 1).tolist(), len(ids)]
    if tokenizer is None:
        return tuple(
            TextPiece(" ".join(map(str, ids[start:stop])) + (" " if stop < len(ids) else ""), bool(learned[start]))
            for start, stop in zip([0, *cuts[:-1]], cuts)
        )
    text = _decode(ids, tokenizer)
    stops = [common_length(text, _decode(ids[:cut], tokenizer)) for cut in cuts[:-1]] + [len(text)]
    bounds = zip([0, *stops[:-1]], stops, [0, *cuts[:-1]])
    return tuple(TextPiece(text[start:stop], bool(learned[first])) for start, stop, first in bounds)


def unpadded_length(sample: Sample) -> int:
    """Return the number of input positions without padding."""
    ids = sample["input_ids"]
    tokens = _shifted(sample) if TARGETS.name in sample else (ids, np.zeros(len(ids), dtype=bool))
    _, padding = _without_padding(sample, *tokens)
    return len(ids) - padding


def _decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), type(text)
    return text


def _shifted(sample: Sample) -> Tokens:
    """Return the inputs and, if there is one, the last target, which is no input: (S,) or (S + 1,)."""
    ids, targets = sample["input_ids"], sample["targets"]
    if len(ids) != len(targets):
        return ids, np.zeros(len(ids), dtype=bool)
    learned = np.concatenate([[False], TARGETS.carries_loss(targets)])
    tokens = np.concatenate([ids, [INPUT_IDS.fill]])
    tokens[learned] = targets[learned[1:]]
    end = len(tokens) if learned[-1] else len(ids)
    return tokens[:end], learned[:end]


def _in_place(sample: Sample) -> Tokens:
    """Return the inputs with each hidden token replaced by its target."""
    learned = TARGETS.carries_loss(sample["targets"])
    return np.where(learned, sample["targets"], sample["input_ids"]), learned


def _without_padding(sample: Sample, ids: np.ndarray, learned: np.ndarray) -> tuple[Tokens, int]:
    """Return the tokens before the padding, and its length. Without a mask, padding is all fill values at the end."""
    size = len(sample["input_ids"])
    if len(ids) > size:
        return (ids, learned), 0
    if "attention_mask" in sample:
        used = sample["attention_mask"] | learned
    else:
        used = (ids != INPUT_IDS.fill) | learned
    end = int(np.flatnonzero(used)[-1]) + 1 if used.any() else 0
    if "position_ids" in sample:  # padding is a document of its own
        last = int(np.flatnonzero(sample["position_ids"] == 0)[-1])
        end = size if end > last else last
    return (ids[:end], learned[:end]), size - end
