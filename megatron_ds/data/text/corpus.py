"""`format: text`: documents, the stream of their tokens, and the samples of a causal model cut out of it.

All documents form one stream of tokens, each followed by the id that ends a document. A causal model's sample i is
tokens [i*S, i*S + S] of it: S inputs and the S targets one further on, so that samples share one token and every token
but the first is a target once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ds.data.dataset import Sample, blank_sample
from megatron_ds.data.readers.concat_index import Concatenation
from megatron_ds.data.readers.sources import JSON_SUFFIXES, FileSource, TableSource, find_source, json_lines
from megatron_ds.errors import DataError

TEXT_COLUMN = "text"
TEXT_SUFFIXES = (".txt", *JSON_SUFFIXES)
_READ_BYTES = 1 << 22
_TABLE_ROWS = 256
_SCAN_TOKENS = 1 << 22


class TextSource:
    """The documents behind one source string: a `.txt` file is one, a JSON line one, a row of a table one.

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
        """Every document in order. Text is taken as it is: no line ending is translated, nothing is stripped.

        Raises:
            DataError: naming the file and line (or row) that is malformed.
        """
        if isinstance(self._source, TableSource):
            yield from _table_documents(self._source)
            return
        for path in self._source.paths:
            yield from _json_documents(path) if path.suffix.lower() in JSON_SUFFIXES else [_read_text(path)]

    def digest(self) -> str:
        """SHA-256 of the content: bytes of files, texts of rows; of no name, path or time."""
        digest = hashlib.sha256()
        if isinstance(self._source, FileSource):
            for path in self._source.paths:
                kind = "json" if path.suffix.lower() in JSON_SUFFIXES else "txt"
                digest.update(f"{kind}:{file_digest(path)}\n".encode())
            return digest.hexdigest()
        for text in _table_documents(self._source):
            raw = text.encode("utf-8")
            digest.update(b"row:%d\n" % len(raw) + raw)
        return digest.hexdigest()


class TokenStream:
    """Several token arrays, read as if they were one. Nothing is copied before it is read.

    Args:
        parts: 1-d arrays of any unsigned type, memory-mapped ones included.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = list(parts)
        self._whole = Concatenation([len(part) for part in self._parts])

    def __len__(self) -> int:
        return len(self._whole)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as (stop - start,) int64."""
        assert 0 <= start <= stop <= len(self), f"[{start}, {stop}) of {len(self)} tokens"
        tokens = np.empty(stop - start, dtype=np.int64)
        filled = 0
        while filled < len(tokens):
            part, offset = self._whole.locate(start + filled)
            piece = self._parts[part][offset : offset + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
        return tokens

    def positions_of(self, token: int) -> np.ndarray:
        """Where `token` stands: (number of times,) int64, ascending. Reads the whole stream once, piece by piece."""
        found = [
            start + np.flatnonzero(self.read(start, min(start + _SCAN_TOKENS, len(self))) == token)
            for start in range(0, len(self), _SCAN_TOKENS)
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *found])


@dataclass(frozen=True)
class Corpus:
    """The tokens of all sources of a dataset.

    Attributes:
        tokens: the stream of them.
        digest: hash of the stream's content, from which a dataset's fingerprint is made.
        name: the sources, for errors.
    """

    tokens: TokenStream
    digest: str
    name: str

    def fingerprint(self, *settings: object) -> str:
        """SHA-256 of the content and of whatever else decides the samples."""
        lines = ["text", self.digest, *map(str, settings)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def require_sample(self, num_tokens: int, seq_length: int, largest_length: int) -> None:
        """Refuses a corpus that does not fill one sample.

        Args:
            num_tokens: what one sample takes.
            seq_length: S of the run.
            largest_length: the largest S that the corpus could fill; below 1 if there is none.

        Raises:
            DataError: fewer than `num_tokens` tokens.
        """
        if len(self.tokens) < num_tokens:
            fix = f"lower data.seq_length to at most {largest_length} or add text" if largest_length > 0 else "add text"
            raise DataError(
                f"data: {self.name}: {len(self.tokens)} tokens do not fill one sample of data.seq_length={seq_length}, "
                f"which takes {num_tokens}; {fix}"
            )


class CausalText:
    """Samples of S consecutive tokens of a stream; `len` is (T - 1) // S, the remainder at the end is left out.

    Args:
        corpus: a stream of T tokens.
        seq_length: S.

    Raises:
        DataError: fewer than S + 1 tokens.
    """

    columns = ("input_ids", "targets")
    target_length = None
    ordered = False

    def __init__(self, corpus: Corpus, seq_length: int) -> None:
        corpus.require_sample(seq_length + 1, seq_length, len(corpus.tokens) - 1)
        self.seq_length = seq_length
        self.fingerprint = corpus.fingerprint(f"seq_length={seq_length}")
        self._tokens = corpus.tokens

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self.seq_length

    def sample(self, index: int) -> Sample:
        """With i = index % len: tokens [i*S, i*S + S] as (S,) inputs and (S,) targets, the same in every epoch."""
        start = index % len(self) * self.seq_length
        window = self._tokens.read(start, start + self.seq_length + 1)
        return {"input_ids": window[:-1], "targets": window[1:]}

    def blank(self) -> Sample:
        """See `blank_sample`."""
        return blank_sample(self.columns, self.seq_length, self.target_length)

    def describe(self) -> str:
        """Such as `353,442 tokens, 690 samples of 512`."""
        return f"{count(len(self._tokens))} tokens, {len(self):,} samples of {self.seq_length}"


def count(number: int) -> str:
    """A number for people: exact below a million, then one decimal of M or B."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:,}"


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
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
            raise DataError(
                f"data: {where}: {kind} {TEXT_COLUMN!r} holds a lone surrogate at character {error.start}; remove it"
            ) from error
        return value
    if value is None and TEXT_COLUMN not in names:
        raise DataError(f"data: {where}: no {kind} {TEXT_COLUMN!r}, only {', '.join(names) or 'an empty object'}")
    raise DataError(f"data: {where}: {kind} {TEXT_COLUMN!r} holds {type(value).__name__}; it must hold a string")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
