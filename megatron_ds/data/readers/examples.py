"""Examples of any source, with their place for errors: read in a pass, or one by one.

A source is checked from start to end when it is opened; after that, each example is read on demand.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from megatron_ds.data.readers.bad_rows import BadRows
from megatron_ds.data.readers.file_kinds import DataFile, naming_damage
from megatron_ds.data.readers.hub_stream import Stream
from megatron_ds.data.readers.json_rows import is_document, json_rows, lines, parse_json_line
from megatron_ds.data.readers.row import Row
from megatron_ds.data.readers.row_cache import StoredRows, stored_rows
from megatron_ds.data.readers.source import Source
from megatron_ds.data.readers.sources import FoundSource, Part, Table
from megatron_ds.data.readers.table_rows import arrow_rows, csv_rows, dataset_rows, parquet_rows
from megatron_ds.errors import DataError

TEXT_COLUMN = "text"
_STRUCTURES = (
    "messages",
    "conversations",
    "conversation",
    "history",
    "tools",
    "functions",
    "input_ids",
    "labels",
    "scores",
    "tokens",
    "tags",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "next_sentence_label",
    "decoder_input_ids",
    "decoder_attention_mask",
)
"""Fields that are no texts: in a CSV file they are JSON, and missing where they are empty."""

Parsed = TypeVar("Parsed")


class Located(NamedTuple):
    """An example.

    Attributes:
        columns: its fields, under our names.
        where: its place (file and line, or row), for errors.
        names: of its fields in the data, for errors.
        fills_nulls: whether it is a row of a table, whose nested objects hold a null for each key of other rows.
    """

    columns: Mapping[str, Any]
    where: str
    names: Collection[str] = ()
    fills_nulls: bool = False


class ExampleFile(Protocol):
    """The examples of one file or table."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Located:
        """Return example `index`, 0 <= index < len."""


def parse_examples(
    found: FoundSource,
    parse: Callable[[Located], Parsed],
    bad: BadRows | None = None,
    only: Collection[str] | None = None,
) -> Iterator[Parsed]:
    """Yield `parse` of every example of a source, in order, with a few in memory at a time.

    Args:
        found: the source.
        parse: makes something of an example; raises DataError where it is malformed.
        bad: takes the rows without a usable example; None = the first of them is an error.
        only: our names of the fields that are needed; others may be left out. None = all.

    Raises:
        DataError: the source is damaged, or holds a bad row and bad rows are refused.
    """
    bad = bad if bad is not None else BadRows()
    for part in found.parts:
        for row in part_rows(part, found.source, only):
            try:
                parsed = parse(locate(row, found.source, part))
            except DataError as problem:
                bad.add(problem)
            else:
                yield parsed


def open_examples(
    found: FoundSource, visit: Callable[[Located], None], bad: BadRows, cache_dir: Path
) -> Sequence[ExampleFile]:
    """Open the examples of a source for reading one by one.

    Args:
        found: the source.
        visit: called with every example, once, in order; raises DataError where an example is malformed.
        bad: takes the rows that hold no usable example; they are not among the examples.
        cache_dir: directory for the rows of files that cannot be read at any place, such as compressed ones.

    Raises:
        DataError: the source is missing or damaged, or holds a bad row and bad rows are refused.
    """

    source = found.source

    def accept(row: Row, part: Part) -> bool:
        try:
            visit(locate(row, source, part))
        except DataError as problem:
            bad.add(problem)
            return False
        return True

    opened: list[ExampleFile] = []
    for part in found.parts:
        assert not isinstance(part, Stream), "its rows are read once"
        if isinstance(part, Table):
            opened.append(_TableExamples(part, source, accept))
        elif part.content == "json" and not part.compression and not is_document(part, _data_names(source)):
            opened.append(_JsonLinesFile(part, source, accept))
        else:
            rows = stored_rows(part, partial(part_rows, part, source, None), _data_names(source), cache_dir)
            opened.append(_StoredExamples(rows, part, source, accept))
    return opened


def part_rows(part: Part, source: Source, only: Collection[str] | None) -> Iterator[Row]:
    """Yield the rows of a file or table, as the data name their fields; `only` as in `parse_examples`."""
    wanted = None if only is None else {name for ours in only for name in source.names_of(ours)}
    if isinstance(part, Table):
        yield from dataset_rows(part.table, part.name, wanted)
        return
    if isinstance(part, Stream):
        yield from part.rows(wanted)
        return
    with naming_damage(part.path, part.compression or ("" if part.content in ("text", "json") else part.content)):
        match part.content:
            case "text":
                try:
                    with part.open() as stream:
                        raw = stream.read()
                except MemoryError:
                    fix = "try JSON lines, with a document on each"
                    raise DataError(f"data: {part.path}: does not fit into memory as one document; {fix}") from None
                yield Row(str(part.path), partial(_text_fields, raw, part.path))
            case "json":
                yield from json_rows(part, _data_names(source))
            case "csv":
                yield from csv_rows(part)
            case "parquet":
                yield from parquet_rows(part, wanted)
            case "arrow":
                yield from arrow_rows(part, wanted)


def locate(row: Row, source: Source, part: Part) -> Located:
    """Return the example in a row, under our names.

    Raises:
        DataError: the row holds no fields.
    """
    given = columns = row.load()
    if isinstance(part, DataFile) and part.content == "text":
        return Located(columns, row.where, columns.keys())
    columns = source.rename(given)
    if isinstance(part, DataFile) and part.content == "csv":
        columns = {name: _structure(value) if name in _STRUCTURES else value for name, value in columns.items()}
    fills_nulls = not isinstance(part, DataFile) or part.content in ("parquet", "arrow")
    return Located(columns, row.where, given.keys(), fills_nulls)


def _text_fields(raw: bytes, path: Path) -> Mapping[str, str]:
    """Return the only example of a text file: all of it, without a byte order mark and otherwise unchanged."""
    try:
        return {TEXT_COLUMN: raw.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"data: {path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def _structure(value: str) -> Any:
    """Return the value of a field in a CSV file that is no text: JSON, or nothing; anything else is left as it is."""
    try:
        return json.loads(value) if value else None
    except (ValueError, RecursionError):
        return value


def _data_names(source: Source) -> frozenset[str]:
    return frozenset(theirs for _, theirs in source.columns)


class _JsonLinesFile:
    """The examples of one file: the offset of each line is kept in memory, a line is parsed on demand."""

    def __init__(self, file: DataFile, source: Source, accept: Callable[[Row, Part], bool]) -> None:
        self._file, self._source = file, source
        index = []
        with file.open() as stream:
            for line in lines(stream, str(file.path)):
                where = f"{file.path}:{line.number}"
                if accept(Row(where, partial(parse_json_line, line.raw, where)), file):
                    index.append((line.number, line.offset, len(line.raw)))
        self._index = np.asarray(index, dtype=np.int64).reshape(-1, 3)
        # Mapped rather than opened: forked processes would share the position of an open file.
        self._raw = np.memmap(file.path, dtype=np.uint8, mode="r") if index else np.empty(0, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> Located:
        number, offset, num_bytes = self._index[index].tolist()
        where = f"{self._file.path}:{number}"
        raw = self._raw[offset : offset + num_bytes].tobytes()
        return locate(Row(where, partial(parse_json_line, raw, where)), self._source, self._file)


class _StoredExamples:
    """The examples of a file whose rows are kept in the cache, one JSON text each."""

    def __init__(self, rows: StoredRows, file: DataFile, source: Source, accept: Callable[[Row, Part], bool]) -> None:
        self._rows, self._file, self._source = rows, file, source
        self._kept = np.flatnonzero([accept(rows.row(index), file) for index in range(len(rows))])

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, index: int) -> Located:
        return locate(self._rows.row(int(self._kept[index])), self._source, self._file)


class _TableExamples:
    """The rows of a `datasets.Dataset`."""

    def __init__(self, table: Table, source: Source, accept: Callable[[Row, Part], bool]) -> None:
        self._table, self._source = table, source
        self._kept = np.flatnonzero([accept(row, table) for row in part_rows(table, source, None)])

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, index: int) -> Located:
        row = int(self._kept[index])
        return locate(Row(f"{self._table.name}: row {row}", lambda: self._table.table[row]), self._source, self._table)
