"""Documents of `data.format: text`: `.txt` files, JSON lines and tables, read in order."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ds.data.readers.digests import file_sha256
from megatron_ds.data.readers.sources import JSON_SUFFIXES, FileSource, TableSource, find_source, json_lines
from megatron_ds.errors import DataError

TEXT_COLUMN = "text"
TEXT_SUFFIXES = (".txt", *JSON_SUFFIXES)
_TABLE_ROWS = 256


class TextSource:
    """The documents of one source: a `.txt` file, a JSON line or a row of a table is one document.

    Raises:
        DataError: the source is missing or is a table without a `text` column.
    """

    def __init__(self, source: str) -> None:
        self.name = source
        self._source = find_source(source, TEXT_SUFFIXES)
        if isinstance(self._source, TableSource) and TEXT_COLUMN not in self._source.table.column_names:
            columns = ", ".join(self._source.table.column_names)
            raise DataError(
                f"data: {source}: no column {TEXT_COLUMN!r}, only {columns}; "
                f"rename_column the one that holds the text to {TEXT_COLUMN!r}"
            )

    def documents(self) -> Iterator[str]:
        """Yield every document in order, unchanged: no line ending is translated, nothing is stripped.

        Raises:
            DataError: a document is malformed; names its file and line (or row).
        """
        if isinstance(self._source, TableSource):
            yield from _table_documents(self._source)
            return
        for path in self._source.paths:
            yield from _json_documents(path) if path.suffix.lower() in JSON_SUFFIXES else [_read_text(path)]

    def digest(self) -> str:
        """Return the SHA-256 of the content: bytes of files, texts of rows. Names, paths and times do not count."""
        digest = hashlib.sha256()
        if isinstance(self._source, FileSource):
            for path in self._source.paths:
                kind = "json" if path.suffix.lower() in JSON_SUFFIXES else "txt"
                digest.update(f"{kind}:{file_sha256(path)}\n".encode())
            return digest.hexdigest()
        for text in _table_documents(self._source):
            raw = text.encode("utf-8")
            digest.update(b"row:%d\n" % len(raw) + raw)
        return digest.hexdigest()


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"data: {path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def _json_documents(path: Path) -> Iterator[str]:
    for line in json_lines(path):
        yield _require_text(line.value.get(TEXT_COLUMN), f"{path}:{line.number}", "field", sorted(line.value))


def _table_documents(source: TableSource) -> Iterator[str]:
    row = 0
    for batch in source.table.select_columns([TEXT_COLUMN]).iter(_TABLE_ROWS):
        for value in batch[TEXT_COLUMN]:
            yield _require_text(value, f"{source.name}: row {row}", "column", source.table.column_names)
            row += 1


def _require_text(value: object, where: str, kind: str, names: Sequence[str]) -> str:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, which is no character
            raise DataError(
                f"data: {where}: {kind} {TEXT_COLUMN!r} holds a lone surrogate at character {error.start}; remove it"
            ) from error
        return value
    if value is None and TEXT_COLUMN not in names:
        raise DataError(f"data: {where}: no {kind} {TEXT_COLUMN!r}, only {', '.join(names) or 'an empty object'}")
    raise DataError(f"data: {where}: {kind} {TEXT_COLUMN!r} holds {type(value).__name__}; it must hold a string")
