"""Kinds of data files: compression and kind are judged by the content, and by the name where content cannot tell.

A compressed file is read as a stream, whatever its name. Damage is an error of the file, not of a row: nothing after it
can be trusted.
"""

import bz2
import gzip
import io
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megatron_ds.errors import DataError

Content = Literal["text", "json", "csv", "parquet", "arrow"]

_CONTENTS: dict[str, Content] = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstandard", ".bz2": "bzip2", ".xz": "xz"}
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstandard": re.compile(rb"\x28\xb5\x2f\xfd"),
    "bzip2": re.compile(rb"BZh[1-9](\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class DataFile:
    """A file of examples.

    Attributes:
        path: of the file.
        content: kind of the content, after decompression.
        compression: name of the compression; empty = none.
        head: the first bytes, after decompression.
    """

    path: Path
    content: Content
    compression: str
    head: bytes

    @property
    def has_bom(self) -> bool:
        """True if the file begins with the byte order mark of UTF-8."""
        return self.head.startswith(BOM)

    @property
    def identity(self) -> str:
        """A text that, with the bytes of the file, decides its rows."""
        name = _ending(self.path) if self.content == "csv" else self.content
        return f"{name} {self.compression}".strip()

    def open(self) -> IO[bytes]:
        """Open the decompressed content as a stream."""
        return _open(self.path, self.compression)

    @contextmanager
    def open_seekable(self) -> Iterator[IO[bytes]]:
        """Open the decompressed content for reading at any place; a compressed file is unpacked for that."""
        if not self.compression:
            with self.path.open("rb") as file:
                yield file
            return
        with tempfile.TemporaryFile() as unpacked, self.open() as stream:
            shutil.copyfileobj(stream, unpacked, 1 << 20)
            unpacked.seek(0)
            yield unpacked


def file_endings(plain_text: bool) -> tuple[str, ...]:
    """Return the endings of files that hold examples, without those of compressions.

    Args:
        plain_text: whether a text without fields is an example.
    """
    return tuple(ending for ending, content in _CONTENTS.items() if plain_text or content != "text")


def has_data_name(path: Path, plain_text: bool) -> bool:
    """Return True if the name of a file says that it holds examples."""
    return _ending(path) in file_endings(plain_text)


def has_compressed_name(path: Path) -> bool:
    """Return True if the name of a file says that it is compressed."""
    return path.suffix.lower() in _COMPRESSIONS


def identify(path: Path, plain_text: bool) -> DataFile | None:
    """Return the kind of a file; None if neither its name nor its content is that of examples.

    Raises:
        DataError: the file is damaged, or its text is not UTF-8.
    """
    with naming_damage(path, ""), path.open("rb") as file:
        start = file.read(16)
    compression = next((name for name, magic in _MAGIC.items() if magic.match(start)), "")
    named = _COMPRESSIONS.get(path.suffix.lower(), "")
    if named and not start:
        raise DataError(f"data: {path}: the {named} file is empty; try to copy or make it again")
    with naming_damage(path, compression), _open(path, compression) as stream:
        head = stream.read(_HEAD_BYTES)
    content = _content(path, head, plain_text)
    if content in ("text", "json", "csv"):
        _require_utf8(path, head)
    return DataFile(path, content, compression, head) if content is not None else None


@contextmanager
def naming_damage(path: Path, kind: str) -> Iterator[None]:
    """Turn errors of decompressing or decoding a file into one that names it.

    Args:
        path: of the file.
        kind: what it should be, such as `parquet`; empty = a plain file.

    Raises:
        DataError: the file cannot be read as what it is.
    """
    import pyarrow

    damage = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
    try:
        yield
    except damage as error:
        if not kind:
            raise DataError(f"data: {path}: cannot be read ({error})") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"data: {path}: is not a readable {kind} file ({reason}); it is damaged or cut off; try to copy it again"
        ) from error


def _open(path: Path, compression: str) -> IO[bytes]:
    return _OPEN[compression](path)


def _open_zstandard(path: Path) -> IO[bytes]:
    import pyarrow  # unlike zstandard's own reader, it reports a file that was cut off

    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream, 1 << 20)


_OPEN: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
    "zstandard": _open_zstandard,
}


def _ending(path: Path) -> str:
    """Return the ending of a file's name, without that of its compression, in small letters."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    return name.suffix.lower()


def _content(path: Path, head: bytes, plain_text: bool) -> Content | None:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    named = _CONTENTS.get(_ending(path))
    if named is not None and (plain_text or named != "text"):
        return named
    return "json" if head.removeprefix(BOM).lstrip()[:1] in (b"{", b"[") else None


def _require_utf8(path: Path, head: bytes) -> None:
    """Refuse UTF-16 and UTF-32, which text editors of Windows write; other bytes are judged line by line."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:4]:
        raise DataError(
            f"data: {path}: the text is UTF-16 or UTF-32, not UTF-8; try "
            f"iconv -f UTF-16 -t UTF-8 {path.name} > converted{path.suffix}"
        )
