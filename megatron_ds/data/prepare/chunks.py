"""Sources cut into chunks, which any process can read by itself: byte ranges of JSON lines, row groups, ranges of rows.

A chunk gives its documents in order, and a line for each that is none. What is cut how depends on the sources alone, so
that the number of workers changes nothing.
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
        file: its number among all files; one that is named twice has two.
        source: as the user wrote it.
        path: the file; the source itself where it is a table.
        kind: its suffix; "table" for those of `datasets`.
        start, stop: bytes of JSON lines and text, row groups of parquet, rows of a table.
        bytes: about what there is to read, for the progress bar.
    """

    file: int
    source: str
    path: str
    kind: str
    start: int
    stop: int
    bytes: int


@dataclass(frozen=True)
class Document:
    """A text, or what is wrong with it.

    Attributes:
        text: None = it is none.
        line: its number in the chunk, from 0: of lines, or rows.
        problem: why it is none; empty where it is one.
    """

    text: str | None
    line: int
    problem: str = ""


def cut(sources: Sequence[str]) -> list[Chunk]:
    """Every chunk, in order.

    Raises:
        DataError: a source is missing or of a kind that is not read.
    """
    numbers = count()
    return [chunk for source in sources for chunk in _cut(source, numbers)]


def _cut(source: str, numbers: Iterator[int]) -> Iterator[Chunk]:
    found = find_source(source, SUFFIXES)
    if not isinstance(found, FileSource):
        whole = Chunk(next(numbers), source, source, "table", 0, len(found.table), found.table.data.nbytes)
        yield from _ranges(whole, CHUNK_ROWS)
        return
    for path in found.paths:
        size, suffix = path.stat().st_size, path.suffix.lower()
        if suffix == PARQUET:
            yield from _ranges(Chunk(next(numbers), source, str(path), PARQUET, 0, _row_groups(path), size), 1)
        elif suffix == TEXT:
            yield Chunk(next(numbers), source, str(path), TEXT, 0, size, size)
        else:
            yield from _ranges(Chunk(next(numbers), source, str(path), ".jsonl", 0, size, size), CHUNK_BYTES)


def _ranges(whole: Chunk, step: int) -> Iterator[Chunk]:
    for start in range(0, whole.stop, step):
        stop = min(start + step, whole.stop)
        size = whole.bytes * stop // whole.stop - whole.bytes * start // whole.stop
        yield replace(whole, start=start, stop=stop, bytes=size)


def identity(chunks: Sequence[Chunk]) -> list[dict[str, Any]]:
    """What the sources are, cheaply: of each file its size, and a hash of its first and last MiB; of a table its own
    fingerprint. Names are for people."""
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
    """Reads chunks; keeps a table open from one to the next.

    Args:
        column: the field that holds the text.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._open: tuple[str, datasets.Dataset] | None = None

    def documents(self, chunk: Chunk) -> Iterator[Document]:
        """Its documents, and what is none; blank lines are neither."""
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

    def _json_lines(self, chunk: Chunk) -> Iterator[Document]:
        """The lines that begin in the chunk."""
        with open(chunk.path, "rb") as file:
            file.seek(max(0, chunk.start - 1))
            if chunk.start:
                file.readline()  # of the chunk before, unless a line ends just here
            line = 0
            while file.tell() < chunk.stop and (raw := file.readline()):
                if raw.strip():
                    yield self._of_json(raw, line)
                line += 1
        yield Document(None, line)  # how many lines there were

    def _of_json(self, raw: bytes, line: int) -> Document:
        decoded = _decoded(raw, line)
        if decoded.text is None:
            return decoded
        try:
            value = json.loads(decoded.text)
        except (ValueError, RecursionError) as error:
            return Document(None, line, f"not JSON ({error})")
        if not isinstance(value, dict):
            return Document(None, line, f"holds a JSON {type(value).__name__}, not an object")
        return _checked(value.get(self._column), line, self._column, list(value))

    def _rows(self, given: tuple[list[str], list[Any] | None], chunk: Chunk) -> Iterator[Document]:
        names, values = given
        if values is None:
            raise DataError(f"data: {chunk.path}: no column {self._column!r}, only {_some(names)}; give --column")
        for line, value in enumerate(values):
            yield _checked(value, line, self._column, names)
        yield Document(None, len(values))

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
        raise DataError(f"data: {path}: is no parquet file that can be read ({error})") from error


def _decoded(raw: bytes, line: int) -> Document:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Document(None, line, f"not UTF-8 ({error.reason} at byte {error.start})")
    return Document(text, line) if text else Document(None, line, "empty")


def _some(names: Sequence[str], most: int = 5) -> str:
    """A few names in one line, whatever is in them."""
    shown = [json.dumps(name)[1:-1][:40] for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(shown) or "an empty object") + more


def _checked(value: Any, line: int, column: str, names: Sequence[str]) -> Document:
    if value is None:
        there = f"only {_some(names)}" if column not in names else "it is null"
        return Document(None, line, f"no {column!r}, {there}")
    if not isinstance(value, str):
        return Document(None, line, f"{column!r} holds {type(value).__name__}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        return Document(None, line, f"{column!r} holds a lone surrogate at character {error.start}")
    return Document(value, line) if value else Document(None, line, f"{column!r} is empty")
