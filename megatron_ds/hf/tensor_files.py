"""Files of tensors: names, dtypes and shapes are read at once, data when it is accessed.

Each tensor is a view of its own mapping of the file: the pages that were read are freed with the last view. safetensors
and torch check the files; no code in a pickle is run.
"""

from __future__ import annotations

import mmap
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ds import hub
from megatron_ds.dtypes import DTYPE_OF_CODE
from megatron_ds.errors import ConversionError, show
from megatron_ds.untrusted import check_record, parse_json, require_regular
from megatron_ds.untrusted.limits import TENSOR_HEADER
from megatron_ds.untrusted.records import Record

_READABLE = {  # also parts of quantised weights, and buffers of modules whose tensors are passed through
    **DTYPE_OF_CODE,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_CODES = {dtype: code for code, dtype in _READABLE.items()}
_MOST_DIMS = 64  # of a tensor of torch
_MOST_BYTES_OF_AN_ORDER = 16
_POPULATE_READ = 22  # from Linux 5.14 on; the module mmap has no name for it


def itemsize_of(code: str) -> int:
    """Return the bytes of an element by safetensors' name of its dtype."""
    return _READABLE[code].itemsize


def code_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in safetensors files, or torch's name where no tensor here can have it."""
    return _CODES.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: safetensors' name of it.
        shape, stride: in elements.
        offset: of its first byte, from the start of the file.
        loaded: the tensor itself, if it cannot be mapped from the file.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    offset: int = 0
    loaded: Tensor | None = None

    @property
    def span(self) -> int:
        """Number of elements in memory from the first to the last."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride)) if prod(self.shape) else 0

    def view(self, file: Path, *, ahead: bool = False, rows: slice = slice(None)) -> Tensor:
        """Map the tensor, or some rows. Data is read on access, page by page; or all of it `ahead`, which is faster."""
        return self._full(file, ahead=ahead)[rows] if rows != slice(None) else self._full(file, ahead=ahead)

    def _full(self, file: Path, *, ahead: bool) -> Tensor:
        if self.loaded is not None:
            return self.loaded
        dtype = _READABLE[self.dtype]
        if self.span == 0:
            return torch.empty(self.shape, dtype=dtype)
        before = self.offset % mmap.ALLOCATIONGRANULARITY
        length = before + self.span * dtype.itemsize
        with open(file, "rb") as handle:  # mapped for writing only because torch has no read-only tensors
            mapped = mmap.mmap(handle.fileno(), length, access=mmap.ACCESS_COPY, offset=self.offset - before)
        if ahead and sys.platform == "linux":
            with suppress(OSError):  # an older kernel: read page by page
                mapped.madvise(_POPULATE_READ)
        flat = torch.frombuffer(mapped, dtype=dtype, count=self.span, offset=before)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class RemoteTensor(StoredTensor):
    """A tensor in a file of the hub that was not here when its header was read; the file is downloaded on access.

    Attributes:
        name: its name in the file.
    """

    name: str = ""

    def view(self, file: Path, *, ahead: bool = False, rows: slice = slice(None)) -> Tensor:
        """Download the file if it is not here, and map the tensor, or some rows."""
        return _downloaded_table(file)[self.name].view(file, ahead=ahead, rows=rows)


@cache
def _downloaded_table(file: Path) -> dict[str, StoredTensor]:
    """Download a file and read its header; once a process."""
    hub.fetch([file])
    return _read_safetensors(file)


def read_table(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a file: name -> tensor. Of a safetensors file on the hub only the header is downloaded.

    Raises:
        ConversionError: the file is damaged, or holds anything but tensors.
        HubError: it is on the hub, and cannot be downloaded.
    """
    if not file.is_file() and hub.exists(file):
        if file.suffix != ".bin":
            content = hub.read_header(file)
            stored = _table_of(file, content[8:], len(content))
            return {name: RemoteTensor(one.dtype, one.shape, name=name) for name, one in stored.items()}
        hub.fetch([file])
    try:
        return _read_bin(file) if file.suffix == ".bin" else _read_safetensors(file)
    except OSError as problem:
        raise ConversionError(f"{file}: cannot be read ({problem.strerror or problem})") from problem


def _read_safetensors(file: Path) -> dict[str, StoredTensor]:
    require_regular(file, ConversionError)
    try:
        safe_open(file, framework="pt")  # refuses truncated, overlapping and gapped data, and oversized headers
    except (SafetensorError, MemoryError) as problem:  # a MemoryError: it is too large to be mapped
        raise ConversionError(f"{file}: damaged, or not safetensors ({problem})") from problem
    with open(file, "rb") as handle:
        header_bytes = int.from_bytes(handle.read(8), "little")
        return _table_of(file, handle.read(header_bytes), 8 + header_bytes)


def _table_of(file: Path, header: bytes, data_start: int) -> dict[str, StoredTensor]:
    """Return the tensors that the header of a safetensors file lists; data begin at byte `data_start`."""
    try:  # a repeated name, which safetensors accepts, is refused: the last entry would win
        entries = parse_json(header.decode("utf-8"), "its header", TENSOR_HEADER, ConversionError)
        if isinstance(entries, dict):
            entries.pop("__metadata__", None)
        found = check_record(entries, "its header", dict[str, _Entry], TENSOR_HEADER, ConversionError)
        return {name: entry.stored(name, data_start) for name, entry in found.items()}
    except (UnicodeDecodeError, ConversionError) as problem:
        raise ConversionError(f"{file}: damaged, or not safetensors ({problem})") from problem


class _Entry(Record):
    """A tensor in the header of a safetensors file; offsets are bytes from the end of the header."""

    dtype: str
    shape: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=_MOST_DIMS)]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]

    def stored(self, name: str, data_start: int) -> StoredTensor:
        """Return the tensor of a file whose data begin at byte `data_start`."""
        (start, end), shape = self.data_offsets, tuple(self.shape)
        if self.dtype in _READABLE and prod(shape) * itemsize_of(self.dtype) != end - start:
            raise ConversionError(f"{show(name)} has {end - start} bytes, which are not those of {self.dtype} {shape}")
        return StoredTensor(self.dtype, shape, _contiguous(shape), data_start + start)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _read_bin(file: Path) -> dict[str, StoredTensor]:
    """Read a file of torch.save. Its tensors are mapped, except in the format before torch 1.6, which is loaded."""
    require_regular(file, ConversionError)
    try:
        in_place = _can_be_mapped(file)
        state = torch.load(file, map_location="meta" if in_place else "cpu", weights_only=True)
    except OSError:
        raise
    except Exception as problem:  # torch raises unpickling, zip, runtime and end-of-file errors
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise ConversionError(
            f"{file}: damaged, or holds more than plain tensors, which is not loaded ({reason})"
        ) from problem
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) and value.layout == torch.strided for value in state.values()
    ):
        raise ConversionError(f"{file}: expected a mapping of names to tensors")
    return {str(name): _stored(file, str(name), tensor.detach(), in_place) for name, tensor in state.items()}


def _can_be_mapped(file: Path) -> bool:
    """Test whether a file is a zip of uncompressed tensors in this machine's byte order."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        found = [entry for entry in archive.infolist() if entry.filename.endswith("/byteorder")]
        orders = {archive.read(entry).decode() for entry in found if entry.file_size <= _MOST_BYTES_OF_AN_ORDER}
        return orders <= {sys.byteorder} and all(not entry.compress_type for entry in archive.infolist())


def _stored(file: Path, name: str, tensor: Tensor, in_place: bool) -> StoredTensor:
    word, shape, size = code_of(tensor.dtype), tuple(tensor.shape), tensor.dtype.itemsize
    if not in_place:
        return StoredTensor(word, shape, loaded=tensor)
    storage = tensor.untyped_storage()
    start: int = getattr(storage, "_checkpoint_offset")  # noqa: B009  torch declares it on one class, sets it on all
    first = int(tensor.storage_offset())
    stored = StoredTensor(word, shape, tensor.stride(), start + first * size)
    used = (first + stored.span) * size
    if used > storage.nbytes() or start + used > file.stat().st_size:  # a pickle can hold any offset
        raise ConversionError(f"{file}: damaged: {name} ends after the end of its data")
    return stored
