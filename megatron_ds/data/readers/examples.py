"""Examples in JSON-lines files and tables, with their place for errors: read in a pass, or one by one.

A file is checked from start to end when it is opened; after that, each example is read on demand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from megatron_ds.data.readers.sources import (
    JSON_SUFFIXES,
    FileSource,
    TableSource,
    find_source,
    json_lines,
    parse_json_line,
)

_TABLE_ROWS = 256


class Located(NamedTuple):
    """The fields of an example, and its place (file and line, or row), for errors."""

    columns: Mapping[str, Any]
    where: str


class ExampleFile(Protocol):
    """The examples of one file or table."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Located:
        """Return example `index`, 0 <= index < len."""


def open_examples(source: str, visit: Callable[[Located], None]) -> Sequence[ExampleFile]:
    """Open the examples of a source: a JSON-lines file, a directory of them, a saved `datasets`, or a hub id.

    Args:
        source: as written under `data.train`.
        visit: called with every example, once, in order; raises where an example is malformed.

    Raises:
        DataError: the source is missing, or one of its lines is not a JSON object.
    """
    found = find_source(source, JSON_SUFFIXES)
    if isinstance(found, FileSource):
        return [_JsonLinesFile(path, visit) for path in found.paths]
    return [_Table(found, visit)]


def iterate_examples(source: str) -> Iterator[Located]:
    """Yield every example of a source, once, in order, with a few in memory at a time.

    Raises:
        DataError: as `open_examples`.
    """
    found = find_source(source, JSON_SUFFIXES)
    if isinstance(found, FileSource):
        for path in found.paths:
            yield from (Located(line.value, f"{path}:{line.number}") for line in json_lines(path))
    else:
        yield from _iterate_table(found)


def _iterate_table(source: TableSource) -> Iterator[Located]:
    row = 0
    for batch in source.table.iter(_TABLE_ROWS):
        for values in zip(*batch.values()):
            yield Located(dict(zip(batch, values)), f"{source.name}: row {row}")
            row += 1


class _JsonLinesFile:
    """The examples of one file: the offset of each line is kept in memory, a line is parsed on demand."""

    def __init__(self, path: Path, visit: Callable[[Located], None]) -> None:
        self._path = path
        index = []
        for line in json_lines(path):
            visit(Located(line.value, f"{path}:{line.number}"))
            index.append((line.number, line.offset, line.num_bytes))
        self._index = np.asarray(index, dtype=np.int64).reshape(-1, 3)
        # Mapped rather than opened: forked processes would share the position of an open file.
        self._raw = np.memmap(path, dtype=np.uint8, mode="r") if index else np.empty(0, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> Located:
        number, offset, num_bytes = self._index[index].tolist()
        where = f"{self._path}:{number}"
        return Located(parse_json_line(self._raw[offset : offset + num_bytes].tobytes(), where), where)


class _Table:
    """The rows of a `datasets.Dataset`."""

    def __init__(self, source: TableSource, visit: Callable[[Located], None]) -> None:
        self._source = source
        for located in _iterate_table(source):
            visit(located)

    def __len__(self) -> int:
        return len(self._source.table)

    def read(self, index: int) -> Located:
        return Located(self._source.table[index], f"{self._source.name}: row {index}")
