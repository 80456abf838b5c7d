"""Files of a checkpoint: written through to the disk with their checksums, and checked again before they are believed.

A checksum is XXH3 of 128 bits (xxhash): it finds any damage, at the speed of memory. It is no signature.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from megatron_ds.hf.tensor_files import code_of

_CHUNK_BYTES = 2**24
_ALIGNMENT = 64


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its length and its checksum."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Entry:
    """A tensor that a file is going to hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Piece:
    """A tensor on its way to a file, CPU and contiguous."""

    file: str
    name: str
    tensor: Tensor


class TensorFile:
    """A safetensors file, written from front to back. What it will hold is known from the start.

    Args:
        path: of a file that is not there yet.
        entries: its tensors, in the order in which they will come.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._coming = list(reversed(entries))
        self._hash, self._bytes = xxhash.xxh3_128(), 0
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  closed by `close`
        self._write(_header(entries))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor; afterwards it may change."""
        entry = self._coming.pop()
        assert (entry.name, entry.dtype, entry.shape) == (name, tensor.dtype, tuple(tensor.shape)), (entry, name)
        if tensor.numel():
            self._write(tensor.reshape(-1).view(torch.uint8).numpy().data)

    @property
    def is_complete(self) -> bool:
        return not self._coming

    def finish(self) -> FileRecord:
        """Have it on the disk."""
        assert self.is_complete, self._coming
        os.fsync(self._file.fileno())
        self._file.close()
        return FileRecord(self._bytes, self._hash.hexdigest())

    def close(self) -> None:
        """Let go of it, whole or not; closing twice is fine."""
        self._file.close()

    def _write(self, data: Any) -> None:
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = data[start : start + _CHUNK_BYTES]
            self._hash.update(chunk)
            while len(chunk):  # a full disk takes a part first
                chunk = chunk[self._file.write(chunk) :]
        self._bytes += len(data)


def _header(entries: Iterable[Entry]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": code_of(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.bytes],
        }
        at += entry.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_pieces(
    directory: Path, files: Mapping[str, Sequence[Entry]], pieces: Iterator[Piece]
) -> dict[str, FileRecord]:
    """Write files of tensors, one after the other, and through to the disk.

    Args:
        directory: where.
        files: path under `directory` -> its tensors; a file without any is written too.
        pieces: their data, in this order. They are taken to the last even if writing fails: other ranks may be waiting
            for this one to take part in making them.

    Raises:
        OSError: the disk is full, or something else of the kind.
    """
    records: dict[str, FileRecord] = {}
    open_file: TensorFile | None = None
    try:
        for name, entries in files.items():
            open_file = TensorFile(directory / name, entries)
            while not open_file.is_complete:
                piece = next(pieces)
                assert piece.file == name, (piece.file, name)
                open_file.add(piece.name, piece.tensor)
            records[name] = open_file.finish()
        return records
    finally:
        if open_file is not None:
            open_file.close()
        for _ in pieces:
            pass


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Write a small file, through to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), xxhash.xxh3_128(data).hexdigest())


def record_file(path: Path) -> FileRecord:
    """What a file is now."""
    with open(path, "rb") as file:
        digest, size = xxhash.xxh3_128(), 0
        for chunk in _chunks(file):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def damage(path: Path, expected: FileRecord) -> str | None:
    """What is wrong with a file, in a few words; None if it is as it was written."""
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return f"has {size} bytes instead of {expected.bytes}"
        return None if record_file(path) == expected else "does not have the checksum that it was written with"
    except FileNotFoundError:
        return "is missing"
    except OSError as problem:
        return f"cannot be read ({problem.strerror or problem})"


def flush(path: Path) -> None:
    """Have a file's bytes, or the names in a directory, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
