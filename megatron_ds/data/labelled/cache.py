"""Labelled rows as tokens, computed once and cached by content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megatron_ds.data.labelled.encoding import RowEncoder
from megatron_ds.data.labelled.rows import RowParser
from megatron_ds.data.labelled.table_classes import check_table_classes
from megatron_ds.data.objective import Labelled
from megatron_ds.data.readers.array_cache import cached_arrays
from megatron_ds.data.readers.bad_rows import BAD_ARRAYS
from megatron_ds.data.readers.batched import batched
from megatron_ds.data.readers.cached_rows import CachedRows, check_rows
from megatron_ds.data.readers.examples import parse_examples
from megatron_ds.data.readers.source import Source
from megatron_ds.data.readers.sources import FoundSource, find_source
from megatron_ds.errors import DataError
from megatron_ds.log import get_logger

FORMAT_VERSION = 1
_BATCH = 1024
_ARRAYS = {
    "ids": "i4 1",
    "types": "u1 1",
    "labels": "i8 1, f4 2",
    "starts": "i8 1",
    "full_lengths": "i8 1",
    "places": "U 1",
}


@dataclass(frozen=True)
class EncodedRows(CachedRows):
    """The labelled rows of one source.

    Attributes:
        types: (T,) uint8.
        labels: (n,) int64 classes, (n, L) float32 scores, or (T,) int64 classes of tokens.
        full_lengths: (n,) int64: tokens of each before it was cut.
    """

    types: np.ndarray
    labels: np.ndarray
    full_lengths: np.ndarray


def cached_rows(
    source: Source, objective: Labelled, encoder: RowEncoder, tokenizer_digest: str, directory: Path
) -> EncodedRows:
    """Return the rows of a source, tokenized unless `directory` holds them already. Safe for concurrent processes.

    Args:
        source: the source.
        objective: what the model predicts.
        encoder: of the rows.
        tokenizer_digest: hash of the tokenizer.
        directory: of the cache.

    Raises:
        DataError: the source is malformed, or `directory` cannot be written.
    """
    found = find_source(source, plain_text=False)
    check_table_classes(found, objective)
    settings = (objective.problem, objective.of_words, objective.classes)
    content = f"{FORMAT_VERSION}\n{found.digest()}\n{tokenizer_digest}\n{encoder.identity}\n{settings}"
    key = hashlib.sha256(content.encode()).hexdigest()
    arrays = cached_arrays(
        directory,
        f"{key}.labelled",
        _ARRAYS,
        lambda: _make(found, objective, encoder),
        BAD_ARRAYS,
        partial(
            check_rows, of_tokens=("types", *(["labels"] if objective.of_words else [])), of_rows=("full_lengths",)
        ),
    )
    rows = EncodedRows(key, source, **arrays)
    rows.bad_rows.require_skip(source.skip_bad)
    return rows


def _make(found: FoundSource, objective: Labelled, encoder: RowEncoder) -> dict[str, np.ndarray]:
    source = found.source
    get_logger("data").info("tokenizing %s", source)
    bad, prefix = source.bad_rows(), source.prefix
    ids, types, labels, full_lengths, places = [], [], [], [], []
    rows = parse_examples(found, RowParser(objective, source).parse, bad)
    for batch in batched(rows, _BATCH):
        for row, encoded in zip(batch, encoder.encode(batch)):
            if not len(encoded.ids):
                bad.add(DataError(f"data: {row.where}: the text has no tokens; remove the row"))
                continue
            ids.append(encoded.ids)
            types.append(encoded.types)
            labels.append(encoded.labels)
            full_lengths.append(encoded.full_length)
            places.append(row.where.removeprefix(prefix))
    if not ids:
        bad.refuse_all(source)
        raise DataError(f"data: {source}: no rows; each line or row must hold a text and its label")
    return {
        "ids": np.concatenate(ids).astype(np.int32),
        "types": np.concatenate(types).astype(np.uint8),
        "labels": np.concatenate(labels) if objective.of_words else np.stack(labels),
        "starts": np.cumsum([0, *map(len, ids)], dtype=np.int64),
        "full_lengths": np.asarray(full_lengths, dtype=np.int64),
        "places": np.asarray(places),
        **bad.arrays(prefix),
    }
