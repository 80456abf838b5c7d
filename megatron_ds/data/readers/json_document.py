"""Rows of a JSON file that is one document: an array of objects, an object that holds one such list, or objects that
extend over several lines.

The document is parsed piece by piece; no more than one row and one block of text are in memory at a time.
"""

import codecs
import json
import re
from collections.abc import Collection, Iterator
from json import JSONDecodeError
from typing import IO, Any, NamedTuple

from megatron_ds.errors import DataError
from megatron_ds.untrusted.limits import ROW

WRAPPERS = ("data", "rows", "examples", "items", "records", "instances", "samples", "train")
"""Names under which an object holds the list of rows."""
_BLOCK_BYTES = 1 << 16
_NEAR_END = 32  # an error this close to the end of the text read so far may be that of a value that goes on
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


class Value(NamedTuple):
    """A row of a document, and the line on which it begins."""

    line: int
    value: Any


def document_rows(stream: IO[bytes], name: str, columns: Collection[str]) -> Iterator[Value]:
    """Yield the rows of a document, in order.

    Args:
        stream: the document.
        name: of the file, for errors.
        columns: fields of a row; a list under one of these names is not the list of rows.

    Raises:
        DataError: the document is not JSON, or holds several lists. An array has no line ends to continue at, so this
            is an error of the file.
    """
    text = _Text(stream, name)
    is_array = False
    while text.peek():
        if is_array:
            raise text.error("there is more after the end of the array")
        is_array = text.peek() == "["
        if is_array:
            yield from _items(text)
        else:
            yield from _object(text, set(WRAPPERS) - set(columns))


class _Text:
    """Decoded text of a stream, parsed from the front."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name = stream, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False
        self.line = 1

    def peek(self) -> str:
        """Return the next character that is no space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._advance(match.end())
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def take(self, expected: str) -> None:
        """Skip a character, which must be the next one."""
        found = self.peek()
        if found != expected:
            raise self.error(f"expected {expected!r}, found {found!r}" if found else "the document is cut off")
        self._advance(self._at + 1)

    def value(self) -> Value:
        """Parse the next value."""
        if not self.peek():
            raise self.error("the document is cut off")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except JSONDecodeError as error:
                left = 0 if error.msg.startswith("Unterminated string") else len(self._text) - error.pos
                if self._ended or left > _NEAR_END:
                    raise self.error(error.msg if left > 0 else "the document is cut off") from error
            except RecursionError as error:
                raise self.error("it is nested too deeply") from error
            except ValueError as error:  # of a number of thousands of digits
                raise self.error(str(error)) from error
            else:
                if end < len(self._text) or self._ended:  # else a number may go on
                    found = Value(self.line, value)
                    self._advance(end)
                    return found
            self._read()

    def error(self, reason: str) -> DataError:
        """Return the error of a document that is not as it must be."""
        return DataError(f"data: {self._name}:{self.line}: not JSON ({reason}); the file must be whole")

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self) -> None:
        """Read at least as much as is unparsed, so that a long value is not parsed again too often."""
        if len(self._text) - self._at > ROW.max_bytes:
            raise self.error(f"a value of more than {ROW.max_bytes:,} characters")
        raw = self._stream.read(max(_BLOCK_BYTES, len(self._text) - self._at))
        try:
            more = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise DataError(
                f"data: {self._name}: not UTF-8 after line {self.line} ({error.reason}); convert the file to UTF-8"
            ) from error
        self._text, self._at, self._ended = self._text[self._at :] + more, 0, not raw


def _items(text: _Text) -> Iterator[Value]:
    """Yield the items of the array that begins here."""
    text.take("[")
    if text.peek() == "]":
        return text.take("]")
    while True:
        yield text.value()
        if text.peek() == "]":
            return text.take("]")
        text.take(",")


def _object(text: _Text, wrappers: set[str]) -> Iterator[Value]:
    """Yield the rows of the list in the object that begins here, or the object itself."""
    text.take("{")
    fields: dict[str, Any] = {}
    line, unwrapped, lists = text.line, False, []
    while text.peek() != "}":
        if fields or unwrapped:
            text.take(",")
        name = text.value().value
        if not isinstance(name, str):
            raise text.error(f"expected the name of a field, found {name!r}")
        text.take(":")
        if name in wrappers and not unwrapped and text.peek() == "[":
            unwrapped = True
            lists.append(name)
            yield from _items(text)
            continue
        fields[name] = text.value().value
        if isinstance(fields[name], list) and any(isinstance(item, dict) for item in fields[name]):
            lists.append(name)
    text.take("}")
    if not unwrapped:
        yield Value(line, fields)
    elif len(lists) > 1:
        raise text.error(f"several lists of rows, {', '.join(lists)}")
