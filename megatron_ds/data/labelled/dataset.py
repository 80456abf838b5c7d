"""Samples of labelled data: one row each, padded on the right."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from megatron_ds.columns import ATTENTION_MASK, INPUT_IDS, TOKEN_TYPE_IDS
from megatron_ds.data.dataset import Sample
from megatron_ds.data.labelled.cache import EncodedRows
from megatron_ds.data.objective import Labelled
from megatron_ds.data.readers.bad_rows import total_bad_rows
from megatron_ds.data.readers.concat_index import ConcatIndex
from megatron_ds.log import get_logger

_NAMED = 12
"""Number of classes that a description names; of more, the most frequent ones."""


class LabelledDataset:
    """Samples of S positions with the labels of their row.

    Args:
        parts: the rows of each source.
        seq_length: S, to which the rows have been cut.
        objective: what the model predicts.

    Attributes:
        num_labels: L, classes or scores of the model.
        bad_rows: account of the rows that were left out.
    """

    target_length = None
    ordered = False

    def __init__(self, parts: Sequence[EncodedRows], seq_length: int, objective: Labelled) -> None:
        self.seq_length, self._objective, self._parts = seq_length, objective, list(parts)
        self.num_labels = len(objective.classes)
        types = (TOKEN_TYPE_IDS.name,) if objective.token_types else ()
        self.columns = (INPUT_IDS.name, ATTENTION_MASK.name, *types, objective.label_column.name)
        self._index = ConcatIndex([len(part) for part in parts])
        self.bad_rows = total_bad_rows(parts)
        self.bad_rows.log()
        full = np.concatenate([part.full_lengths for part in parts])
        self._num_cut = int((full > seq_length).sum())
        if self._num_cut:
            get_logger("data").info(
                "%s of %s rows are cut to data.seq_length=%d; the longest has %s tokens",
                *(f"{self._num_cut:,}", f"{len(full):,}", seq_length, f"{full.max():,}"),
            )
        content = ["labelled", *(part.key for part in parts), str(objective.padding_id), str(objective.num_token_types)]
        self.fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each row, as it was cut."""
        return np.concatenate([part.lengths for part in self._parts])

    def sample(self, index: int) -> Sample:
        """Return row `index % len`: (S,) each; `label` is () and `label_scores` (L,). The same in every epoch."""
        objective, (ids, labels) = self._objective, self.row(index % len(self))
        label = objective.label_column
        sample = {
            INPUT_IDS.name: INPUT_IDS.pad(ids, self.seq_length, objective.padding_id),
            ATTENTION_MASK.name: ATTENTION_MASK.pad(np.ones(len(ids), dtype=bool), self.seq_length),
            label.name: label.pad(labels, self.seq_length) if objective.of_words else labels,
        }
        if objective.token_types:
            sample[TOKEN_TYPE_IDS.name] = TOKEN_TYPE_IDS.pad(self._types(index % len(self)), self.seq_length)
        return {name: sample[name] for name in self.columns}

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's ids (N,) int64, and its labels: () class, (L,) scores, or (N,) classes of tokens."""
        number, row = self._index.locate(index)
        part = self._parts[number]
        start, stop = part.starts[row], part.starts[row + 1]
        labels = part.labels[start:stop] if self._objective.of_words else part.labels[row]
        return part.ids[start:stop].astype(np.int64), np.array(labels)

    def _types(self, index: int) -> np.ndarray:
        number, row = self._index.locate(index)
        part = self._parts[number]
        return part.types[part.starts[row] : part.starts[row + 1]].astype(np.int64)

    def blank(self) -> Sample:
        """Return the first row without its labels, so that the head finds the position that it reads there too."""
        label = self._objective.label_column
        return {**self.sample(0), label.name: label.blank_array(self.seq_length, None, self.num_labels)}

    @cached_property
    def class_counts(self) -> Mapping[str, int]:
        """Name of each class -> number of the rows, or of the words, that have it; empty for scores."""
        if self._objective.problem == "regression":
            return {}
        labels = [np.asarray(part.labels) for part in self._parts]
        if self._objective.problem == "multi_label_classification":
            counts = sum((part > 0.5).sum(axis=0) for part in labels)
        else:
            flat = np.concatenate(labels)
            carries_loss = self._objective.label_column.carries_loss(flat)
            counts = np.bincount(flat[carries_loss], minlength=self.num_labels)
        return dict(zip(self._objective.classes, np.asarray(counts).tolist()))

    def describe(self) -> str:
        """Return a line such as `1,234 rows of 5 to 128 tokens (12 cut), padded to 128; positive 634, negative 600`."""
        lengths, notes = self.lengths, []
        if self._num_cut:
            notes.append(f"{self._num_cut:,} cut")
        if self.bad_rows.count:
            notes.append(self.bad_rows.note.removeprefix(", "))
        note = f" ({', '.join(notes)})" if notes else ""
        sizes = f"{lengths.min():,} to {lengths.max():,}" if lengths.min() < lengths.max() else f"{lengths.max():,}"
        rows = f"{len(self):,} row{'s' * (len(self) != 1)}"
        return f"{rows} of {sizes} tokens{note}, padded to {self.seq_length}; {self._describe_labels()}"

    def _describe_labels(self) -> str:
        counts = sorted(self.class_counts.items(), key=lambda item: -item[1])
        if not counts:
            scores = np.concatenate([part.labels for part in self._parts])
            return f"scores from {scores.min():g} to {scores.max():g}, mean {scores.mean():.4g}"
        named = ", ".join(f"{name} {count:,}" for name, count in counts[:_NAMED])
        rest = counts[_NAMED:]
        more = f" and {len(rest)} more with {rest[0][1]:,} to {rest[-1][1]:,}" if rest else ""
        return f"{'words: ' if self._objective.of_words else ''}{named}{more}"
