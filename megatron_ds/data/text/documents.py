"""Documents of `data.format: text`, in order: text files, and the field `text` of rows of other files and tables."""

import hashlib
from collections.abc import Iterator

from megatron_ds.data.readers.bad_rows import BadRows
from megatron_ds.data.readers.examples import TEXT_COLUMN, Located, parse_examples
from megatron_ds.data.readers.file_kinds import DataFile
from megatron_ds.data.readers.hub_stream import Stream
from megatron_ds.data.readers.source import Source, as_source
from megatron_ds.data.readers.sources import Table, find_source
from megatron_ds.data.readers.text_field import require_text
from megatron_ds.digests import file_sha256
from megatron_ds.errors import DataError


class TextSource:
    """The documents of one source: a text file, a JSON line or a row of a table is one document.

    Raises:
        DataError: the source is missing or is a table without the column that holds the text.
    """

    def __init__(self, source: str | Source) -> None:
        self._source = as_source(source)
        self.name, self.prefix = str(self._source), self._source.prefix
        self._found = find_source(self._source, plain_text=True)
        for part in self._found.parts:
            if isinstance(part, Table):
                _require_column(part, self._source)

    def bad_rows(self) -> BadRows:
        """Return an empty account of the rows without a document."""
        return self._source.bad_rows()

    def documents(self, bad: BadRows | None = None) -> Iterator[str]:
        """Yield every document in order, unchanged: no line ending is translated, nothing is stripped.

        Args:
            bad: takes the rows without a document; None = the first of them is an error.

        Raises:
            DataError: a document is malformed; names its file and line (or row).
        """
        return parse_examples(self._found, self._text, bad, only=(TEXT_COLUMN,))

    def located(self) -> Iterator[tuple[str, str]]:
        """Yield (file and line, or row; document) of every document that is not left out."""
        return parse_examples(
            self._found, lambda one: (one.where, self._text(one)), self.bad_rows(), only=(TEXT_COLUMN,)
        )

    def digest(self) -> str:
        """Return the SHA-256 of the content: bytes of files, texts of rows, the commit of a stream.

        Names of files, paths and times do not count.
        """
        digest = hashlib.sha256(self._source.identity.encode())
        if any(isinstance(part, Stream) for part in self._found.parts):
            return self._found.digest()
        files = [part for part in self._found.parts if isinstance(part, DataFile)]
        if len(files) == len(self._found.parts):
            for file in files:
                digest.update(f"{_kind(file)}:{file_sha256(file.path)}\n".encode())
            return digest.hexdigest()
        bad = self.bad_rows()
        for text in self.documents(bad):
            raw = text.encode("utf-8")
            digest.update(b"row:%d\n" % len(raw) + raw)
        if bad.count:
            digest.update(f"bad:{bad.count}:{bad.first}".encode())
        return digest.hexdigest()

    def _text(self, located: Located) -> str:
        return require_text(located, self._source)


def _kind(file: DataFile) -> str:
    """Return the name of a file's kind in keys; a mark at the beginning is no part of the text, but of the bytes."""
    names = {"text": "txt"}
    return file.identity.replace(file.content, names.get(file.content, file.content), 1) + " bom" * file.has_bom


def _require_column(table: Table, source: Source) -> None:
    names = table.table.column_names
    if not set(source.names_of(TEXT_COLUMN)) & set(names):
        wanted = source.names_of(TEXT_COLUMN)[0]
        raise DataError(
            f"data: {table.name}: no column {wanted!r}, only {', '.join(names)}; rename_column the one that holds the "
            f"text to {wanted!r}, or name it in data.columns.{TEXT_COLUMN}"
        )
