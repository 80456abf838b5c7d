"""Labelled data rendered as text with its labels; what a file's rows predict, where no model says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_ds.columns import ATTENTION_MASK, INPUT_IDS
from megatron_ds.data.dataset import Dataset, Sample
from megatron_ds.data.inspect.rendering import RenderedDocument, RenderedSample, TextPiece, render
from megatron_ds.data.labelled.dataset import LabelledDataset
from megatron_ds.data.labelled.rows import TEXT, WORDS
from megatron_ds.data.objective import Labelled
from megatron_ds.data.parts import parts_of
from megatron_ds.data.readers.examples import Located, parse_examples
from megatron_ds.data.readers.sources import FoundSource
from megatron_ds.errors import DataError, show

RENDERED_TOKENS = 512  # of a row
_LABELS = ("label", "labels", "scores", "score")
_NUMBERS = ("scores", "score")


def is_labelled(names: Collection[str]) -> bool:
    """Return True if a row with these fields is labelled; a text with scores may be one of a filtered corpus."""
    return {TEXT, "label"} <= set(names) or {TEXT, "labels"} <= set(names) or {WORDS, "tags"} <= set(names)


def guess_objective(found: FoundSource) -> Labelled:
    """Return what the rows of a source predict. Reads all of them once; their classes are those that they name.

    Raises:
        DataError: a row is malformed, or no row has a label.
    """
    names: Counter[str] = Counter()
    values: dict[Any, None] = {}
    sizes: set[int] = set()

    def visit(located: Located) -> None:
        field = next((name for name in ("tags", *_LABELS) if located.columns.get(name) is not None), None)
        if field is None:
            return
        value = located.columns[field]
        several: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        names[field] += 1
        sizes.add(len(several))
        if field not in _NUMBERS:
            values.update(dict.fromkeys(one for one in several if isinstance(one, str | int | float)))

    for _ in parse_examples(found, visit, found.source.bad_rows()):
        pass
    if not names:
        raise DataError(f"data: {found.source}: no row has a label")
    ((field, _),) = names.most_common(1)
    if field in _NUMBERS:
        return Labelled("regression", tuple(f"LABEL_{number}" for number in range(max(sizes))))
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        return Labelled("regression", ("LABEL_0",))
    if field == "labels":
        return Labelled("multi_label_classification", _classes(values))
    return Labelled("single_label_classification", _classes(values), of_words=field == "tags")


def _classes(values: Collection[Any]) -> tuple[str, ...]:
    """Return names for classes: those of the data, or numbers from 0 on."""
    texts = sorted({value for value in values if isinstance(value, str)})
    if texts and not all(text.lstrip("-").isdigit() for text in texts):
        return tuple(texts)
    return tuple(map(str, range(max((int(value) for value in values), default=0) + 1)))


def class_counts(data: Dataset) -> Mapping[str, int]:
    """Return name of each class -> number of rows or words that have it; empty for other data."""
    counts: Counter[str] = Counter()
    for _, part in parts_of(data):
        if isinstance(part, LabelledDataset):
            counts.update(part.class_counts)
    return dict(counts)


def render_labelled(
    index: int, sample: Sample, tokenizer: PreTrainedTokenizerBase | None, objective: Labelled
) -> RenderedSample:
    """Render a sample as a dataset returns it."""
    length = int(sample[ATTENTION_MASK.name].sum())
    labels = sample[objective.label_column.name]
    row = sample[INPUT_IDS.name][:length], labels[:length] if objective.of_words else labels
    return render_row(index, *row, tokenizer, objective, padding=len(sample[INPUT_IDS.name]) - length)


def render_row(
    index: int,
    ids: np.ndarray,
    labels: np.ndarray,
    tokenizer: PreTrainedTokenizerBase | None,
    objective: Labelled,
    padding: int = 0,
) -> RenderedSample:
    """Render a row: its text, or its tokens where words have classes.

    Args:
        index: of the sample.
        ids: (N,) without padding.
        labels: () class, (L,) scores, or (N,) classes of tokens.
        tokenizer: None = ids instead of text.
        objective: names the classes.
        padding: number of padding positions.
    """
    if objective.of_words:
        return RenderedSample(index, (_with_classes(ids, labels, tokenizer, objective),), padding)
    document = render((ids, np.zeros(len(ids), dtype=bool)), tokenizer, most=RENDERED_TOKENS)
    return RenderedSample(index, (document,), padding, _label_text(labels, objective))


def _label_text(labels: np.ndarray, objective: Labelled) -> str:
    if objective.problem == "single_label_classification":
        number = int(labels)
        return objective.classes[number] if number >= 0 else "none"
    if objective.problem == "regression":
        return ", ".join(f"{score:g}" for score in labels.tolist())
    given = zip(objective.classes, labels.tolist())
    named = [name if score == 1 else f"{name} {score:g}" for name, score in given if score]
    return show(", ".join(named)) if named else "no class"


def _with_classes(
    ids: np.ndarray, labels: np.ndarray, tokenizer: PreTrainedTokenizerBase | None, objective: Labelled
) -> RenderedDocument:
    """Render tokens, each first token of a word with its class: `ishmael/PER`."""
    carries_loss = objective.label_column.carries_loss(labels)
    kept = ids[:RENDERED_TOKENS].tolist()
    tokens = list(map(str, kept)) if tokenizer is None else tokenizer.convert_ids_to_tokens(kept)
    pieces = []
    for token, label, learned in zip(tokens, labels.tolist(), carries_loss.tolist()):
        pieces.append(TextPiece(f"{token}/{objective.classes[label]}" if learned else token, learned))
        pieces.append(TextPiece(" ", False))
    return RenderedDocument("", len(ids), int(carries_loss.sum()), tuple(pieces[:-1]), len(ids) - len(kept))
