"""Write the files of a checkpoint through to the disk with their checksums, and check them before they are read again.

A checksum is 128-bit XXH3 (xxhash): it detects any damage, at the speed of memory. It is no signature.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_ds.digests import file_xxh3
from megatron_ds.hf.tensor_files import code_of

_CHUNK_BYTES = 2**24
_ALIGNMENT = 64


@dataclass(frozen=True)
class FileRecord:
    """The length and the checksum that a file must have."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class TensorHeader:
    """The name, dtype and shape of a tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorChunk:
    """A tensor to be written to a file, on CPU and contiguous."""

    file: str
    name: str
    tensor: Tensor


class TensorFile:
    """A safetensors file, written from front to back; the headers of its tensors are known from the start.

    Args:
        path: the file, which must not exist yet.
        headers: of its tensors, in the order in which they will be added.
    """

    def __init__(self, path: Path, headers: Sequence[TensorHeader]) -> None:
        self._remaining = list(reversed(headers))
        self._hash, self._bytes = xxhash.xxh3_128(), 0
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  closed by `close`
        self._write(_encode(headers))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; afterwards it may change."""
        header = self._remaining.pop()
        assert header == TensorHeader(name, tensor.dtype, tuple(tensor.shape)), (header, name)
        if tensor.numel():
            self._write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    @property
    def is_complete(self) -> bool:
        return not self._remaining

    def finish(self) -> FileRecord:
        """Flush the file to the disk and close it."""
        assert self.is_complete, self._remaining
        os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(self._bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Close the file, complete or not; closing twice is allowed."""
        self._file.close()

    def _write(self, data: Any) -> None:
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            self._hash.update(chunk)
            while len(chunk):  # a full disk accepts only a part
                chunk = chunk[self._file.write(chunk) :]
        self._bytes += len(data)


def _encode(headers: Iterable[TensorHeader]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for header in headers:
        table[header.name] = {
            "dtype": code_of(header.dtype),
            "shape": list(header.shape),
            "data_offsets": [offset, offset + header.bytes],
        }
        offset += header.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_chunks(
    directory: Path, files: Mapping[str, Sequence[TensorHeader]], chunks: Iterator[TensorChunk]
) -> dict[str, FileRecord]:
    """Write files of tensors, one after the other, and through to the disk.

    Args:
        directory: the directory that they are written to.
        files: path under `directory` -> headers of its tensors; a file without tensors is written too.
        chunks: their data, in this order. The iterator is exhausted even if writing fails: other ranks may be waiting
            for this one in a collective that produces them.

    Raises:
        OSError: the disk is full, or another failure of the file system.
    """
    records: dict[str, FileRecord] = {}
    open_file: TensorFile | None = None
    try:
        for name, headers in files.items():
            open_file = TensorFile(directory / name, headers)
            while not open_file.is_complete:
                chunk = next(chunks)
                assert chunk.file == name, (chunk.file, name)
                open_file.add(chunk.name, chunk.tensor)
            records[name] = open_file.finish()
        return records
    finally:
        if open_file is not None:
            open_file.close()
        for _ in chunks:
            pass


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a small file, through to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), xxhash.xxh3_128(data).hexdigest())


def record_file(path: Path) -> FileRecord:
    """Read a file and return its length and checksum."""
    return FileRecord(path.stat().st_size, file_xxh3(path))


def damage(path: Path, expected: FileRecord) -> str | None:
    """Return the damage of a file as a short text; None if it is intact."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "is no regular file"
        size = status.st_size
        if size != expected.bytes:
            return f"has {size} bytes instead of {expected.bytes}"
        return None if record_file(path) == expected else "does not match its checksum"
    except FileNotFoundError:
        return "is missing"
    except OSError as problem:
        return f"cannot be read ({problem.strerror or problem})"


def flush(path: Path) -> None:
    """Flush a file's bytes, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
