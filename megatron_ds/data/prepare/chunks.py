"""Chunks of sources, each readable by any process: byte ranges of JSON lines, row groups, ranges of rows.

Files that can only be read from start to end, such as compressed ones, are cut into ranges of rows too: each worker
reads all of the file once and tokenizes its own ranges.

A chunk yields its documents in order, and an entry for each line that holds none. Chunks depend on the sources alone:
the number of workers changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from megatron_ds.data.readers.examples import TEXT_COLUMN, part_rows
from megatron_ds.data.readers.file_kinds import BOM, DataFile, identify, naming_damage
from megatron_ds.data.readers.json_rows import is_document
from megatron_ds.data.readers.row import Row
from megatron_ds.data.readers.source import Source, as_source, find_field
from megatron_ds.data.readers.sources import Table, find_source
from megatron_ds.errors import DataError
from megatron_ds.untrusted.limits import ROW

if TYPE_CHECKING:
    import datasets

TEXT, LINES, PARQUET, TABLE, ROWS = ".txt", ".jsonl", ".parquet", "table", "rows"
CHUNK_BYTES = 1 << 18
CHUNK_ROWS = 512
_END_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """A part of a source.

    Attributes:
        file: index of the file among all files; a file that is named twice counts twice.
        source: the source that is this file or table alone.
        path: the file; for a table, its name.
        kind: the way of reading it: ".txt" as one document, ".jsonl" in ranges of bytes, ".parquet" in row groups,
            "table" for tables of `datasets`, "rows" from start to end.
        start, stop: bytes of JSON lines and text, row groups of parquet, rows of a table or of any other file.
        bytes: approximate number of bytes to read, for the progress bar.
    """

    file: int
    source: Source
    path: str
    kind: str
    start: int
    stop: int
    bytes: int


@dataclass(frozen=True)
class ChunkDocument:
    """A text, or the reason why a line or row holds none.

    Attributes:
        text: None if the line holds no document.
        line: number of the line or row in the chunk, from 0; a text is the place in the file itself.
        problem: reason why it holds no document; empty where it does, and in the last entry of a chunk.
    """

    text: str | None
    line: int | str
    problem: str = ""


def cut(sources: Sequence[str | Source]) -> list[Chunk]:
    """Return every chunk of the sources, in order.

    Raises:
        DataError: a source is missing or of an unsupported kind.
    """
    numbers = count()
    return [chunk for source in sources for chunk in _cut(as_source(source), numbers)]


def _cut(source: Source, numbers: Iterator[int]) -> Iterator[Chunk]:
    for part in find_source(source, plain_text=True).parts:
        number = next(numbers)
        if isinstance(part, Table):
            own = source if part.name == str(source) else replace(source, path=part.name, name=None, split=None)
            table = Chunk(number, own, part.name, TABLE, 0, len(part.table), part.table.data.nbytes)
            yield from _ranges(table, CHUNK_ROWS)
            continue
        assert isinstance(part, DataFile), "sources of prepare are not streamed"
        kind, path = _kind(part, source), part.path
        size, own = path.stat().st_size, replace(source, path=str(path))
        if kind == TEXT:
            yield Chunk(number, own, str(path), TEXT, 0, size, size)
        elif kind == PARQUET:
            yield from _ranges(Chunk(number, own, str(path), PARQUET, 0, _row_groups(path), size), 1)
        elif kind == LINES:
            yield from _ranges(Chunk(number, own, str(path), LINES, 0, size, size), CHUNK_BYTES)
        else:
            num_rows = sum(1 for _ in part_rows(part, source, (TEXT_COLUMN,)))
            yield from _ranges(Chunk(number, own, str(path), ROWS, 0, num_rows, size), CHUNK_ROWS)


def _kind(file: DataFile, source: Source) -> str:
    if file.content == "text":
        return TEXT
    if file.compression:
        return ROWS
    if file.content == "json" and not is_document(file, {theirs for _, theirs in source.columns}):
        return LINES
    return PARQUET if file.content == "parquet" else ROWS


def _ranges(file: Chunk, step: int) -> Iterator[Chunk]:
    for start in range(0, file.stop, step):
        stop = min(start + step, file.stop)
        size = file.bytes * stop // file.stop - file.bytes * start // file.stop
        yield replace(file, start=start, stop=stop, bytes=size)


def identity(chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """Identify the sources cheaply: a file by its size and a hash of its first and last MiB, a table by its own
    fingerprint. Names are informational."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        if chunk.file in found:
            continue
        if chunk.kind == TABLE:
            table = _table(chunk.source)
            found[chunk.file] = {"name": str(chunk.source), "rows": len(table), "digest": table._fingerprint}
        else:
            path = Path(chunk.path)
            found[chunk.file] = {"name": chunk.path, "bytes": path.stat().st_size, "digest": _ends_digest(path)}
            if chunk.kind == ROWS:
                (part,) = find_source(chunk.source, plain_text=True).parts
                found[chunk.file]["kind"] = part.identity  # the name may decide it, as for .csv and .tsv
    return list(found.values())


def _ends_digest(path: Path) -> str:
    digest, size = xxhash.xxh3_128(), path.stat().st_size
    with path.open("rb") as file:
        digest.update(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


class Reader:
    """A reader of chunks that keeps a table, and a file that is read from start to end, open between them.

    Args:
        column: the field that holds the text.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._table: tuple[Source, datasets.Dataset] | None = None
        self._file: tuple[int, int, Iterator[Row]] | None = None

    def documents(self, chunk: Chunk) -> Iterator[ChunkDocument]:
        """Yield the documents of a chunk and the lines without one; blank lines are skipped."""
        match chunk.kind:
            case ".txt":
                yield _decoded(_read_file(chunk.path), 0)
            case ".jsonl":
                yield from self._json_lines(chunk)
            case ".parquet":
                yield from self._row_group(chunk)
            case "table":
                table = self._table_of(chunk.source)
                name = self._column_of(table.column_names, chunk)
                yield from self._values(name, table.select_columns([name])[chunk.start : chunk.stop][name])
            case "rows":
                yield from self._rows(chunk)

    def _json_lines(self, chunk: Chunk) -> Iterator[ChunkDocument]:
        """Yield the lines that begin in the chunk, then an entry with their number."""
        with open(chunk.path, "rb") as file:
            file.seek(max(0, chunk.start - 1))
            if chunk.start:
                file.readline()  # belongs to the chunk before, unless a line ends exactly here
            line = 0
            while file.tell() < chunk.stop and (raw := file.readline(ROW.max_bytes + 1)):
                if len(raw) > ROW.max_bytes:
                    raise DataError(f"data: {chunk.path}: a line has more than {ROW.max_bytes:,} bytes; {ROW.fix}")
                if raw.strip():
                    yield self._of_json(raw, line)
                line += 1
        yield ChunkDocument(None, line)  # the number of lines

    def _of_json(self, raw: bytes, line: int) -> ChunkDocument:
        decoded = _decoded(raw.removeprefix(BOM), line)
        if decoded.text is None:
            return decoded
        try:
            value = json.loads(decoded.text)
        except (ValueError, RecursionError) as error:
            return ChunkDocument(None, line, f"not JSON ({error})")
        if not isinstance(value, dict):
            return ChunkDocument(None, line, f"holds a JSON {type(value).__name__}, not an object")
        return self._checked(value, line)

    def _column_of(self, names: Sequence[str], chunk: Chunk) -> str:
        """Return the column of a table that holds the text, or objects with it."""
        for name in (self._column, self._column.partition(".")[0]):
            if name in names:
                return name
        raise DataError(f"data: {chunk.path}: no column {self._column!r}, only {_some(names)}; give --column")

    def _values(self, name: str, values: Sequence[Any]) -> Iterator[ChunkDocument]:
        for line, value in enumerate(values):
            yield self._checked({name: value}, line)
        yield ChunkDocument(None, len(values))

    def _rows(self, chunk: Chunk) -> Iterator[ChunkDocument]:
        """Yield the documents of a range of rows; the rows before it are skipped."""
        number, at, rows = self._file or (-1, 0, iter(()))
        if number != chunk.file:
            (part,) = find_source(chunk.source, plain_text=True).parts
            at, rows = 0, part_rows(part, chunk.source, (TEXT_COLUMN,))
        assert at <= chunk.start, f"a worker reads the chunks of a file in order, not {chunk.start} after {at}"
        for row in islice(rows, chunk.start - at, chunk.stop - at):
            try:
                columns = row.load()
            except DataError as problem:
                place, _, reason = str(problem).removeprefix(f"data: {row.where}").partition(": ")
                yield ChunkDocument(None, row.where + place, reason)
            else:
                yield self._checked(columns, row.where)
        self._file = chunk.file, chunk.stop, rows
        yield ChunkDocument(None, chunk.stop - chunk.start)

    def _row_group(self, chunk: Chunk) -> Iterator[ChunkDocument]:
        import pyarrow.parquet

        with naming_damage(Path(chunk.path), "parquet"):
            file = pyarrow.parquet.ParquetFile(chunk.path)
            name = self._column_of(file.schema_arrow.names, chunk)
            values = file.read_row_group(chunk.start, columns=[name]).column(0).to_pylist()
        yield from self._values(name, values)

    def _checked(self, columns: Mapping[str, Any], line: int | str) -> ChunkDocument:
        found, value = find_field(columns, self._column)
        return _checked(value, line, self._column, [self._column] if found else list(columns))

    def _table_of(self, source: Source) -> datasets.Dataset:
        if self._table is None or self._table[0] != source:
            self._table = source, _table(source)
        return self._table[1]


def _table(source: Source) -> datasets.Dataset:
    (part,) = find_source(source, plain_text=True).parts
    assert isinstance(part, Table), source
    return part.table


def _read_file(path: str) -> bytes:
    """Return the decompressed content of a text file, without a byte order mark."""
    file = identify(Path(path), plain_text=True)
    assert file is not None, path
    with naming_damage(file.path, file.compression), file.open() as stream:
        return stream.read().removeprefix(BOM)


def _row_groups(path: Path) -> int:
    import pyarrow.parquet

    with naming_damage(path, "parquet"):
        return pyarrow.parquet.ParquetFile(path).num_row_groups


def _decoded(raw: bytes, line: int) -> ChunkDocument:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return ChunkDocument(None, line, f"not UTF-8 ({error.reason} at byte {error.start})")
    return ChunkDocument(text, line) if text else ChunkDocument(None, line, "empty")


def _some(names: Sequence[str], most: int = 5) -> str:
    """Return a few names on one line, escaped and shortened."""
    shown = [json.dumps(name)[1:-1][:40] for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(shown) or "an empty object") + more


def _checked(value: Any, line: int | str, column: str, names: Sequence[str]) -> ChunkDocument:
    if value is None:
        reason = f"only {_some(names)}" if column not in names else "it is null"
        return ChunkDocument(None, line, f"no {column!r}, {reason}")
    if not isinstance(value, str):
        return ChunkDocument(None, line, f"{column!r} holds {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, which is no character
        return ChunkDocument(None, line, f"{column!r} holds a lone surrogate at character {error.start}")
    return ChunkDocument(value, line) if value else ChunkDocument(None, line, f"{column!r} is empty")
