"""The format of training data, by its name and its first row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ds.data.readers.examples import TEXT_COLUMN, part_rows
from megatron_ds.data.readers.file_kinds import DataFile
from megatron_ds.data.readers.source import Source
from megatron_ds.data.readers.sources import find_source
from megatron_ds.errors import DataError, show

_FORMAT_OF_FIELD = {
    "messages": "chat",
    "conversations": "chat",
    "conversation": "chat",
    "input_ids": "tokenized",
}
_CHAT_PAIRS = (("prompt", "completion"), ("instruction", "output"))
_LABELS = ("label", "labels", "score", "scores", "tags")


@dataclass(frozen=True)
class FoundFormat:
    """The format of a source.

    Attributes:
        name: value of `data.format`.
        column: the field with the text, if it has another name than `text`.
        reason: the name or field that it follows from, for a comment.
    """

    name: str
    column: str | None
    reason: str


def find_format(path: str, *, has_label_head: bool) -> FoundFormat:
    """Return the format of a source of training data; of a data set on the hub, the first row is read.

    Args:
        path: a file, a directory, a pattern, a data set on the hub, or the prefix of indexed files.
        has_label_head: whether the model has a head for classes or scores, whose data have labels.

    Raises:
        DataError: there is nothing of that name, or its rows have no field that a format reads.
    """
    if Path(f"{path}.idx").is_file():
        return FoundFormat("indexed", None, f"{path}.idx")
    source = Source(path)
    part = find_source(source, plain_text=True).parts[0]
    if isinstance(part, DataFile) and part.content == "text":
        return FoundFormat("text", None, "plain text")
    row = next(iter(part_rows(part, source, None)), None)
    if row is None:
        raise DataError(f"--data={path}: it holds no row; try data with at least one")
    return _format_of_row(path, row.load(), has_label_head)


def _format_of_row(path: str, row: Mapping[str, Any], has_label_head: bool) -> FoundFormat:
    if has_label_head and (labels := next((name for name in _LABELS if name in row), None)):
        return FoundFormat("labelled", None, f"the field {labels}")
    for field, name in _FORMAT_OF_FIELD.items():
        if field in row:
            return FoundFormat(name, None, f"the field {field}")
    for pair in _CHAT_PAIRS:
        if row.keys() >= set(pair):
            return FoundFormat("chat", None, f"the fields {' and '.join(pair)}")
    if row.keys() >= {"chosen", "rejected"}:
        raise DataError(
            f"--data={path}: its rows are pairs for preference training, chosen and rejected, which no format reads; "
            "to learn the chosen reply, try rows with prompt and completion"
        )
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    if TEXT_COLUMN in texts:
        return FoundFormat("text", None, f"the field {TEXT_COLUMN}")
    if not texts:
        raise DataError(
            f"--data={path}: its first row has the fields {', '.join(map(show, row))}, of which no format reads one; "
            f"try {TEXT_COLUMN}, messages or input_ids"
        )
    longest = max(texts, key=lambda name: len(texts[name]))
    return FoundFormat("text", longest, f"the field {longest}, which has the longest text")
