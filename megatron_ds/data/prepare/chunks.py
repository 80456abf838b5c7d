"""Chunks of sources, each readable by any process: byte ranges of JSON lines, row groups, ranges of rows.

A chunk yields its documents in order, and an entry for each line that holds none. Chunks depend on the sources alone:
the number of workers changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from megatron_ds.data.readers.sources import JSON_SUFFIXES, FileSource, find_source
from megatron_ds.errors import DataError

if TYPE_CHECKING:
    import datasets

TEXT, PARQUET = ".txt", ".parquet"
SUFFIXES = (TEXT, *JSON_SUFFIXES, PARQUET)
CHUNK_BYTES = 1 << 18
CHUNK_ROWS = 512
_END_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """A part of a source.

    Attributes:
        file: index of the file among all files; a file that is named twice counts twice.
        source: as the user wrote it.
        path: the file; for a table, the source itself.
        kind: suffix of the file; "table" for tables of `datasets`.
        start, stop: bytes of JSON lines and text, row groups of parquet, rows of a table.
        bytes: approximate number of bytes to read, for the progress bar.
    """

    file: int
    source: str
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
        line: number of the line or row in the chunk, from 0.
        problem: reason why it holds no document; empty where it does, and in the last entry of a chunk.
    """

    text: str | None
    line: int
    problem: str = ""


def cut(sources: Sequence[str]) -> list[Chunk]:
    """Return every chunk of the sources, in order.

    Raises:
        DataError: a source is missing or of an unsupported kind.
    """
    numbers = count()
    return [chunk for source in sources for chunk in _cut(source, numbers)]


def _cut(source: str, numbers: Iterator[int]) -> Iterator[Chunk]:
    found = find_source(source, SUFFIXES)
    if not isinstance(found, FileSource):
        table = Chunk(next(numbers), source, source, "table", 0, len(found.table), found.table.data.nbytes)
        yield from _ranges(table, CHUNK_ROWS)
        return
    for path in found.paths:
        size, suffix = path.stat().st_size, path.suffix.lower()
        if suffix == PARQUET:
            yield from _ranges(Chunk(next(numbers), source, str(path), PARQUET, 0, _row_groups(path), size), 1)
        elif suffix == TEXT:
            yield Chunk(next(numbers), source, str(path), TEXT, 0, size, size)
        else:
            yield from _ranges(Chunk(next(numbers), source, str(path), ".jsonl", 0, size, size), CHUNK_BYTES)


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
        if chunk.kind == "table":
            table = _table(chunk.source)
            found[chunk.file] = {"name": chunk.source, "rows": len(table), "digest": table._fingerprint}
        else:
            path = Path(chunk.path)
            found[chunk.file] = {"name": chunk.path, "bytes": path.stat().st_size, "digest": _ends_digest(path)}
    return list(found.values())


def _ends_digest(path: Path) -> str:
    digest, size = xxhash.xxh3_128(), path.stat().st_size
    with path.open("rb") as file:
        digest.update(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


class Reader:
    """A reader of chunks that keeps a table open between them.

    Args:
        column: the field that holds the text.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._open: tuple[str, datasets.Dataset] | None = None

    def documents(self, chunk: Chunk) -> Iterator[ChunkDocument]:
        """Yield the documents of a chunk and the lines without one; blank lines are skipped."""
        if chunk.kind == TEXT:
            yield _decoded(Path(chunk.path).read_bytes(), 0)
        elif chunk.kind == ".jsonl":
            yield from self._json_lines(chunk)
        elif chunk.kind == PARQUET:
            yield from self._rows(self._row_group(chunk), chunk)
        else:
            table = self._table_of(chunk.source)
            names = table.column_names
            values = table[chunk.start : chunk.stop][self._column] if self._column in names else None
            yield from self._rows((names, values), chunk)

    def _json_lines(self, chunk: Chunk) -> Iterator[ChunkDocument]:
        """Yield the lines that begin in the chunk, then an entry with their number."""
        with open(chunk.path, "rb") as file:
            file.seek(max(0, chunk.start - 1))
            if chunk.start:
                file.readline()  # belongs to the chunk before, unless a line ends exactly here
            line = 0
            while file.tell() < chunk.stop and (raw := file.readline()):
                if raw.strip():
                    yield self._of_json(raw, line)
                line += 1
        yield ChunkDocument(None, line)  # the number of lines

    def _of_json(self, raw: bytes, line: int) -> ChunkDocument:
        decoded = _decoded(raw, line)
        if decoded.text is None:
            return decoded
        try:
            value = json.loads(decoded.text)
        except (ValueError, RecursionError) as error:
            return ChunkDocument(None, line, f"not JSON ({error})")
        if not isinstance(value, dict):
            return ChunkDocument(None, line, f"holds a JSON {type(value).__name__}, not an object")
        return _checked(value.get(self._column), line, self._column, list(value))

    def _rows(self, given: tuple[list[str], list[Any] | None], chunk: Chunk) -> Iterator[ChunkDocument]:
        names, values = given
        if values is None:
            raise DataError(f"data: {chunk.path}: no column {self._column!r}, only {_some(names)}; give --column")
        for line, value in enumerate(values):
            yield _checked(value, line, self._column, names)
        yield ChunkDocument(None, len(values))

    def _row_group(self, chunk: Chunk) -> tuple[list[str], list[Any] | None]:
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(chunk.path)
        names = file.schema_arrow.names
        if self._column not in names:
            return names, None
        return names, file.read_row_group(chunk.start, columns=[self._column]).column(0).to_pylist()

    def _table_of(self, source: str) -> datasets.Dataset:
        if self._open is None or self._open[0] != source:
            self._open = source, _table(source)
        return self._open[1]


def _table(source: str) -> datasets.Dataset:
    found = find_source(source, SUFFIXES)
    assert not isinstance(found, FileSource), source
    return found.table


def _row_groups(path: Path) -> int:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).num_row_groups
    except (OSError, ValueError) as error:
        raise DataError(f"data: {path}: is not a readable parquet file ({error})") from error


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


def _checked(value: Any, line: int, column: str, names: Sequence[str]) -> ChunkDocument:
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
