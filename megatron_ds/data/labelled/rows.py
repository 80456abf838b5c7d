"""Rows of labelled data: their texts or words, and their labels as numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ds.columns import IGNORE_INDEX
from megatron_ds.data.labelled.classes import ClassNumbers
from megatron_ds.data.objective import Labelled
from megatron_ds.data.readers.examples import Located
from megatron_ds.data.readers.source import Source
from megatron_ds.data.readers.text_field import require_text
from megatron_ds.errors import DataError, show

TEXT, PAIR, WORDS = "text", "text_pair", "tokens"
_LABELS_OF = {
    "single_label_classification": ("label",),
    "multi_label_classification": ("labels", "scores"),
    "regression": ("score", "scores", "label"),
}
"""What a model predicts -> the fields that may hold its labels, of which the first one that a row has is read."""
_LARGEST = float(np.finfo(np.float32).max)
_LABELS_OF_WORDS = ("tags",)
FIELDS = (TEXT, PAIR, "label", "labels", "score", "scores", WORDS, *_LABELS_OF_WORDS)
"""Fields of a row."""


@dataclass(frozen=True)
class LabelledRow:
    """A row.

    Attributes:
        text: the text; with classes of words, the words.
        pair: the second text; None = one text alone.
        labels: () int64 class, (L,) float32 scores, or (words,) int64 classes.
        where: its place, for errors.
    """

    text: str | Sequence[str]
    pair: str | None
    labels: np.ndarray
    where: str


class RowParser:
    """Checks of rows against what a model predicts.

    Args:
        objective: what it predicts.
        source: the source of the rows.
    """

    def __init__(self, objective: Labelled, source: Source) -> None:
        self._objective, self._source = objective, source
        self._classes = ClassNumbers(objective.classes)
        self._read: Mapping[str, Callable[[Any, str], np.ndarray]] = {
            "label": self._score if objective.problem == "regression" else self._class,
            "labels": self._several_classes,
            "score": self._score,
            "scores": self._scores,
            "tags": self._classes_of_words,
        }

    def parse(self, located: Located) -> LabelledRow:
        """Return the row of an example; unrelated fields are ignored.

        Raises:
            DataError: the row has no text or no label of the kind that the model predicts.
        """
        present = {name: value for name, value in located.columns.items() if value is not None}
        located, where = located._replace(columns=present), located.where
        field = self._label_field(located)
        labels = self._read[field](present[field], f"{where}: {self._name(field)}")
        if not self._objective.of_words:
            pair = require_text(located, self._source, PAIR) if PAIR in present else None
            return LabelledRow(require_text(located, self._source), pair, labels, where)
        words = self._words(located)
        if len(words) != len(labels):
            raise DataError(
                f"data: {where}: {self._name(field)} has {len(labels)} entries, and {self._name(WORDS)} has "
                f"{len(words)}; each word needs one"
            )
        return LabelledRow(words, None, labels, where)

    def _name(self, field: str) -> str:
        """Return a field's name in the data."""
        return self._source.names_of(field)[0]

    def _label_field(self, located: Located) -> str:
        objective = self._objective
        fields = _LABELS_OF_WORDS if objective.of_words else _LABELS_OF[objective.problem]
        found = next((field for field in fields if field in located.columns), None)
        if found is not None:
            return found
        predicted = "a class of each word" if objective.of_words else objective.problem
        empty = next((self._name(field) for field in fields if self._name(field) in located.names), None)
        if empty is not None:
            raise DataError(
                f"data: {located.where}: {empty} is null, and this model ({predicted}) learns it; give it a value, or "
                "remove the row"
            )
        others = [name for name in FIELDS if name in located.columns and name not in (TEXT, PAIR, WORDS)]
        has = f"has {others[0]}" if others else f"has only {', '.join(sorted(located.names)) or 'an empty object'}"
        fix = (
            "choose the head in model.head={problem: ...} to train another kind"
            if others
            else f"name the one that holds it in data.columns.{fields[0]}"
        )
        raise DataError(
            f"data: {located.where}: no {' or '.join(map(self._name, fields))}, which this model ({predicted}) learns, "
            f"but the row {has}; {fix}"
        )

    def _words(self, located: Located) -> Sequence[str]:
        words, name = located.columns.get(WORDS), self._name(WORDS)
        if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
            kind = "nothing" if words is None else show(words)
            raise DataError(f"data: {located.where}: {name} must be a list of words, found {kind}")
        return words

    def _class(self, value: Any, place: str) -> np.ndarray:
        return np.array(self._classes.find(value, place), dtype=np.int64)

    def _classes_of_words(self, value: Any, place: str) -> np.ndarray:
        return np.array([self._classes.find(one, place) for one in _list(value, place)], dtype=np.int64)

    def _several_classes(self, value: Any, place: str) -> np.ndarray:
        given = _list(value, place)
        numbers = [self._classes.find(one, place) for one in given]
        if IGNORE_INDEX in numbers or len(set(numbers)) < len(numbers) or any(isinstance(one, float) for one in given):
            raise DataError(
                f"data: {place}={show(value)} names the classes of a row, each once; numbers such as [0.0, 1.0] for "
                "all classes belong in scores"
            )
        scores = np.zeros(len(self._objective.classes), dtype=np.float32)
        scores[numbers] = 1.0
        return scores

    def _score(self, value: Any, place: str) -> np.ndarray:
        return self._scores([value], place)

    def _scores(self, value: Any, place: str) -> np.ndarray:
        scores = np.array([_number(one, place) for one in _list(value, place)], dtype=np.float32)
        count = len(self._objective.classes)
        if len(scores) != count:
            raise DataError(f"data: {place}={show(value)} holds {len(scores)} numbers; the model has {count} outputs")
        outside = scores[(scores < 0) | (scores > 1)]
        if self._objective.problem == "multi_label_classification" and len(outside):
            raise DataError(f"data: {place} holds {outside[0]:g}; of a class it is between 0 and 1")
        return scores


def _list(value: Any, place: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise DataError(f'data: {place}={show(value)} is no list; write one, such as ["a", "b"]')
    return value


def _number(value: Any, place: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        rule = "more than fp32 holds" if math.isfinite(number) else "not a finite number"
        raise DataError(f"data: {place}={show(value)} is {rule}")
    return number
