"""Tensors in Hugging Face directories: slices in, shards out, never a whole model in memory.

Reads `model.safetensors`, its sharded form with an index, and `pytorch_model.bin` likewise (memory-mapped,
`weights_only`: no code in a pickle is run). Writes sharded safetensors with an index, under temporary names until
all is there.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ds.errors import ConversionError

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
_SAME_BYTES_CHUNK = 2**26

# ---- reading ---------------------------------------------------------------------------------------------------------


class _Slice(Protocol):
    """A tensor on disk, as safetensors' get_slice gives it."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor: ...


class _File(Protocol):
    """An open file of tensors, as safetensors' safe_open gives it."""

    def keys(self) -> Any: ...
    def get_slice(self, name: str) -> Any: ...


class TensorSource:
    """The tensors of a directory by name, read in slices. Opening it reads headers only.

    Args:
        directory: for messages.
        file_of: name -> file, in the order in which they stand.
        files: the files, open.
    """

    def __init__(self, directory: Path, file_of: Mapping[str, Path], files: Mapping[Path, _File]) -> None:
        self.directory = directory
        self._file_of, self._files = dict(file_of), files

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape on disk, without reading data."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Type on disk in safetensors' words, such as "BF16", without reading data."""
        return self._slice(name).get_dtype()

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, in its dtype on disk. Of a .bin it is a view of the mapped file."""
        return self._slice(name)[slices]

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are equal bit by bit, dtype and shape included; holds some MB at a time."""
        shape = self.shape(first)
        if shape != self.shape(second) or self.dtype(first) != self.dtype(second):
            return False
        rows = max(1, _SAME_BYTES_CHUNK // max(1, shape[1] * 8)) if len(shape) == 2 else shape[0]
        rest = tuple(slice(0, size) for size in shape[1:])
        for start in range(0, shape[0], rows):
            part = (slice(start, min(start + rows, shape[0])), *rest)
            one, other = (self.read(name, part).contiguous().view(torch.uint8) for name in (first, second))
            if not torch.equal(one, other):
                return False
        return True

    def _slice(self, name: str) -> _Slice:
        return self._files[self._file_of[name]].get_slice(name)


def open_directory(directory: str | Path) -> TensorSource:
    """Find a directory's weights: safetensors before .bin, one file before an index, as transformers does.

    Raises:
        ConversionError: no weights, a file missing from an index or outside the directory, a damaged file.
    """
    directory = Path(directory)
    for single in (SAFETENSORS, BIN):
        if (directory / single).is_file():
            file = _open(directory / single)
            return TensorSource(directory, dict.fromkeys(file.keys(), directory / single), {directory / single: file})
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _open_indexed(index)
    raise ConversionError(f"{directory}: no weights here; expected {SAFETENSORS}, {BIN}, or one of their indexes")


def _open_indexed(index: Path) -> TensorSource:
    file_of = _read_index(index)
    files = {file: _open(file) for file in dict.fromkeys(file_of.values())}
    for file, opened in files.items():
        held = set(opened.keys())
        missing = [name for name, place in file_of.items() if place == file and name not in held]
        if missing:
            raise ConversionError(f"{index}: {missing[0]} should be in {file.name}, which does not hold it")
        for name in sorted(held - file_of.keys()):
            file_of[name] = file
    return TensorSource(index.parent, file_of, files)


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ConversionError(f"{index}: not JSON ({problem})") from problem
    except (KeyError, TypeError, AttributeError) as problem:
        raise ConversionError(f"{index}: has no weight_map from tensors to files") from problem
    for name, file in entries.items():
        if Path(file).name != file or file == "..":
            raise ConversionError(f"{index}: {name} points outside the directory, to {file!r}")
        if not (index.parent / file).is_file():
            raise ConversionError(f"{index}: {name} is in {file}, which is missing")
    return {name: index.parent / file for name, file in entries.items()}


def _open(file: Path) -> _File:
    if file.suffix == ".bin":
        return _BinFile(file)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as problem:
        raise ConversionError(f"{file}: damaged, or not safetensors ({problem})") from problem


class _BinFile:
    """A file of torch.save behind the interface of safe_open.

    Memory-mapped, except for the format before torch 1.6, which cannot be: such a file is read as a whole.

    Raises:
        ConversionError: damaged, or anything else than a mapping of names to tensors.
    """

    def __init__(self, file: Path) -> None:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as problem:  # torch lets unpickling, zip, runtime and end-of-file errors through
            reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            raise ConversionError(
                f"{file}: damaged, or holds more than plain tensors, which is not loaded ({reason})"
            ) from problem
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ConversionError(f"{file}: expected a mapping of names to tensors")
        self._state: dict[str, Tensor] = {str(name): tensor.detach() for name, tensor in state.items()}

    def keys(self) -> Any:
        return self._state.keys()

    def get_slice(self, name: str) -> _BinSlice:
        return _BinSlice(self._state[name])


_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class _BinSlice:
    """A tensor of a .bin behind the interface of safetensors' slices."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _DTYPE_NAMES.get(self._tensor.dtype, str(self._tensor.dtype).removeprefix("torch."))

    def __getitem__(self, slices: tuple[slice, ...]) -> Tensor:
        return self._tensor[slices]


# ---- writing ---------------------------------------------------------------------------------------------------------

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """ "5GB" -> bytes, in powers of 1000 as transformers counts; "5GiB" in powers of 1024.

    Raises:
        ConversionError: not a number with a unit, or less than a byte.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B", text.strip().upper())
    if match:
        number, unit, binary = match.groups()
        size_bytes = int(float(number) * (_BINARY_UNITS if binary else _UNITS)[unit])
        if size_bytes > 0:
            return size_bytes
    raise ConversionError(f"max_shard_size={text!r} is not a size; write for example 5GB or 500MB")


class ShardWriter:
    """Stream tensors into safetensors files of at most `max_shard_bytes`; one shard is in memory at a time.

    Files get temporary names until `finish`, which renames them and writes the index (or the one plain file). A tensor
    larger than the limit gets a file of its own.
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.directory, self.max_shard_bytes = directory, max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = self._total_parameters = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of one tensor: it may be a live parameter that changes, or is freed, before its shard is full."""
        size_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size_bytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        self._pending_bytes += size_bytes
        self._total_bytes += size_bytes
        self._total_parameters += tensor.numel()

    def finish(self) -> None:
        """Give the files their final names and write the index."""
        self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            final = SAFETENSORS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self._temporary(number), self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            metadata = {"total_parameters": self._total_parameters, "total_size": self._total_bytes}
            write_json(self.directory / f"{SAFETENSORS}.index.json", {"metadata": metadata, "weight_map": weight_map})

    def _flush(self) -> None:
        if self._pending:
            self._shards.append(list(self._pending))
            file = self._temporary(len(self._shards))
            with_umask_mode(file, lambda: save_file(self._pending, file, metadata={"format": "pt"}))
            self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.directory / f".model-{number:05d}.safetensors.tmp"


def with_umask_mode(file: Path, write: Callable[[], None]) -> None:
    """Write a new file and give it the mode that open() would have given: safetensors makes its files 0600."""
    file.touch()
    mode = file.stat().st_mode
    write()
    file.chmod(mode)


def write_json(path: Path, content: Any) -> None:
    """Write pretty JSON through a temporary name."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
