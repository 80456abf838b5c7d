"""Rows of JSON files: one object on each line, or one document."""

import json
import re
from collections.abc import Collection, Iterator
from functools import partial
from itertools import islice
from typing import IO, Any, NamedTuple

from megatron_ds.data.readers.file_kinds import BOM, DataFile
from megatron_ds.data.readers.json_document import WRAPPERS, document_rows
from megatron_ds.data.readers.row import Row
from megatron_ds.errors import DataError
from megatron_ds.untrusted.limits import ROW

_SCALAR = r'\s*("(?:[^"\\]|\\.)*"|[\w.+-]+)\s*'
_WRAPPED = re.compile(rf'\{{(\s*"[^"]*"\s*:{_SCALAR},)*\s*"(?P<list>{"|".join(WRAPPERS)})"\s*:\s*\[\s*[{{\]]')


class Line(NamedTuple):
    """A line that is not blank: its number from 1, its place in bytes, and its bytes."""

    number: int
    offset: int
    raw: bytes


def lines(stream: IO[bytes], name: str) -> Iterator[Line]:
    """Yield every line of a stream that is not blank, with one line in memory at a time.

    Args:
        stream: the lines.
        name: of the file, for errors.

    Raises:
        DataError: a line is longer than a row may be.
    """
    offset = 0
    for number, raw in enumerate(iter(partial(stream.readline, ROW.max_bytes + 1), b""), 1):
        if len(raw) > ROW.max_bytes:
            raise DataError(f"data: {name}:{number}: longer than {ROW.max_bytes:,} bytes; {ROW.fix}")
        if not raw.isspace():
            yield Line(number, offset, raw)
        offset += len(raw)


def parse_json_line(raw: bytes, where: str) -> dict[str, Any]:
    """Parse the object on one line of a JSON-lines file; `where` names the line in errors."""
    try:
        value = json.loads(raw.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"data: {where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {where}: not JSON ({error}); each line must hold one object") from error
    if not isinstance(value, dict):
        raise DataError(f"data: {where}: holds a JSON {type(value).__name__}; each line must hold one object")
    return value


def json_rows(file: DataFile, columns: Collection[str]) -> Iterator[Row]:
    """Yield the rows of a JSON file.

    Args:
        file: the file.
        columns: fields of a row, as the data name them.
    """
    with file.open() as stream:
        if is_document(file, columns):
            for number, (line, value) in enumerate(document_rows(stream, str(file.path), columns)):
                where = f"{file.path}:{line} (row {number})"
                yield Row(where, partial(_require_object, value, where))
        else:
            for one in lines(stream, str(file.path)):
                where = f"{file.path}:{one.number}"
                yield Row(where, partial(parse_json_line, one.raw, where))


def is_document(file: DataFile, columns: Collection[str]) -> bool:
    """Return True if a JSON file is one document, False if each of its lines holds an object.

    A document begins with an array, with an object that is not closed on its line, or with an object that holds the
    list of rows and is the only one.
    """
    head = file.head.removeprefix(BOM).lstrip()
    if not head.startswith((b"[", b"{")):
        return False
    first, line_end, rest = head.partition(b"\n")
    following = rest.lstrip()[:1]
    if head.startswith(b"["):
        return not (following and _is_json(first))
    if following and _is_json(first):
        return False
    wrapped = _WRAPPED.match(head.decode("utf-8", errors="replace"))
    has_list = wrapped is not None and wrapped["list"] not in columns
    if not following:
        return has_list and (not line_end or _is_json(first)) and _has_one_line(file)
    return following in b'"}]' or (has_list and first.rstrip().endswith((b"[", b",")))


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _has_one_line(file: DataFile) -> bool:
    with file.open() as stream:
        return sum(1 for _ in islice(lines(stream, str(file.path)), 2)) == 1


def _require_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"data: {where}: holds a JSON {type(value).__name__}; each row must be an object")
    return value
