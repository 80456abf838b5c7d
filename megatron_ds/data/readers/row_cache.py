"""Rows of files that are read from start to end, kept in the cache so that each can be read by itself.

An entry is a directory: `rows.jsonl` holds a JSON list for each row (its place, and its fields or the reason why it has
none), `offsets.npy` where each begins. It is named by the content of the file.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from megatron_ds.data.readers.array_cache import EntryFiles, cached_entry
from megatron_ds.data.readers.array_files import check_starts, map_array
from megatron_ds.data.readers.file_kinds import DataFile
from megatron_ds.data.readers.row import Row
from megatron_ds.digests import file_sha256
from megatron_ds.errors import DataError
from megatron_ds.log import get_logger

FORMAT_VERSION = 1


class StoredRows:
    """The rows of a file, memory-mapped.

    Args:
        name: of the file, for errors.
        raw: (bytes,) uint8: the rows, one after the other.
        offsets: (n + 1,) int64: start of each row, and the end of the last.
    """

    def __init__(self, name: str, raw: np.ndarray, offsets: np.ndarray) -> None:
        self._name, self._raw, self._offsets = name, raw, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, index: int) -> Row:
        """Return a row; it is parsed when its fields are asked for."""
        start, stop = self._offsets[index : index + 2].tolist()
        place, columns, problem = json.loads(self._raw[start:stop].tobytes())
        return Row(self._name + place, partial(_columns, columns, self._name, problem))


def stored_rows(
    file: DataFile, read: Callable[[], Iterator[Row]], columns: Collection[str], directory: Path
) -> StoredRows:
    """Return the rows of a file, read unless `directory` holds them already. Safe for concurrent processes.

    Args:
        file: the file.
        read: yields its rows.
        columns: names that decide what a row of a JSON document is.
        directory: the cache.

    Raises:
        DataError: the file is damaged, or `directory` cannot be written.
    """
    content = f"rows {FORMAT_VERSION}\n{file.identity}\n{file_sha256(file.path)}\n{sorted(columns)}"
    key = hashlib.sha256(content.encode()).hexdigest()
    files = EntryFiles(_read, partial(_write, str(file.path), read), _check)
    raw, offsets = cached_entry(directory, f"{key}.rows", files)
    return StoredRows(str(file.path), raw, offsets)


def _read(entry: Path) -> tuple[np.ndarray, np.ndarray]:
    offsets, rows = map_array(entry / "offsets.npy", "i8 1"), entry / "rows.jsonl"
    is_empty = rows.stat().st_size == 0  # an empty file cannot be mapped
    return np.empty(0, dtype=np.uint8) if is_empty else np.memmap(rows, dtype=np.uint8, mode="r"), offsets


def _check(found: tuple[np.ndarray, np.ndarray]) -> None:
    """Check that each row of an entry is one that `_write` writes."""
    raw, offsets = found
    check_starts(offsets, len(raw), "offsets.npy")
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        row = json.loads(raw[start:stop].tobytes())
        if not (
            isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[1], dict | None)
        ):
            raise ValueError(f"a row at byte {start} of rows.jsonl is damaged")


def _write(name: str, read: Callable[[], Iterator[Row]], entry: Path) -> None:
    get_logger("data").info("reading %s", name)
    offsets = [0]
    with (entry / "rows.jsonl").open("wb") as file:
        for row in read():
            columns, reason = None, ""
            try:
                columns = dict(row.load())
            except DataError as problem:
                reason = str(problem).replace(name, "\0")
            stored = [row.where.removeprefix(name), columns, reason]
            offsets.append(offsets[-1] + file.write(json.dumps(stored, default=str).encode() + b"\n"))
    np.save(entry / "offsets.npy", np.asarray(offsets, dtype=np.int64))


def _columns(columns: dict[str, object] | None, name: str, problem: str) -> dict[str, object]:
    if columns is None:
        raise DataError(problem.replace("\0", name))
    return columns
