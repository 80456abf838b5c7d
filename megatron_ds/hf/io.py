"""Tensors in Hugging Face directories: slices in, shards out, never a whole model in memory.

Reads `model.safetensors`, its sharded form with an index, and `pytorch_model.bin` likewise (memory-mapped,
`weights_only`: no code in a pickle is run). Writes sharded safetensors with an index, under temporary names until
all is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ds.errors import ConversionError

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"


class TensorSource:
    """The tensors of a directory by name, read in slices."""

    def __init__(self, directory: Path, files: dict[str, Path]) -> None:
        self.directory = directory
        self._file_of = files
        self._opened: dict[Path, Any] = {}

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape on disk, without reading data."""
        handle = self._open(self._file_of[name])
        if isinstance(handle, dict):
            return tuple(handle[name].shape)
        return tuple(handle.get_slice(name).get_shape())

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A part of a tensor, in its dtype on disk."""
        handle = self._open(self._file_of[name])
        if isinstance(handle, dict):
            return handle[name][slices]
        return handle.get_slice(name)[slices]

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            self._opened[file] = _open_bin(file) if file.suffix == ".bin" else _open_safetensors(file)
        return self._opened[file]


def open_directory(directory: str | Path) -> TensorSource:
    """Find a directory's weights.

    Raises:
        ConversionError: no weights, a file missing from an index or outside the directory, a damaged file.
    """
    directory = Path(directory)
    for single in (SAFETENSORS, BIN):
        index = directory / f"{single}.index.json"
        if index.is_file():
            return TensorSource(directory, _indexed_files(index))
        file = directory / single
        if file.is_file():
            handle = _open_bin(file) if single == BIN else _open_safetensors(file)
            return TensorSource(directory, dict.fromkeys(handle.keys(), file))
    raise ConversionError(f"{directory}: no weights here; expected {SAFETENSORS}, {BIN}, or one of their indexes")


def _indexed_files(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (json.JSONDecodeError, KeyError, AttributeError) as problem:
        raise ConversionError(f"{index}: not an index of weights ({problem!r})") from problem
    files = {}
    for name, file in entries.items():
        path = index.parent / file
        if Path(file).name != file:
            raise ConversionError(f"{index}: {name} points outside the directory, to {file!r}")
        if not path.is_file():
            raise ConversionError(f"{index}: {name} is in {file}, which is missing")
        files[name] = path
    return files


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as problem:
        raise ConversionError(f"{file}: damaged or not safetensors ({problem})") from problem


def _open_bin(file: Path) -> dict[str, Tensor]:
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be memory-mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as problem:
        reason = str(problem).splitlines()[0]
        raise ConversionError(f"{file}: not a file of plain tensors ({reason})") from problem
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConversionError(f"{file}: expected a mapping of names to tensors")
    return state


def parse_size(text: str) -> int:
    """ "5GB" -> bytes, in powers of 1000 as transformers counts.

    Raises:
        ConversionError: not a number with a unit.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    for unit, factor in units.items():
        number = text.upper().removesuffix(unit)
        if number != text.upper() and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * factor)
    raise ConversionError(f"max_shard_size={text!r} is not a size; write for example 5GB or 500MB")


class ShardWriter:
    """Stream tensors into safetensors files of at most `max_shard_bytes`; one shard is in memory at a time.

    Files get temporary names until `finish`, which renames them and writes the index (or the one plain file).
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self.directory, self.max_shard_bytes = directory, max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = self._total_parameters = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it must not change before the next `add` or `finish`."""
        size_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size_bytes > self.max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.detach().cpu().contiguous()
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
            save_file(self._pending, self._temporary(len(self._shards)), metadata={"format": "pt"})
            self._pending, self._pending_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.directory / f".model-{number:05d}.safetensors.tmp"


def write_json(path: Path, content: Any) -> None:
    """Write pretty JSON through a temporary name."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def same_bytes(source: TensorSource, first: str, second: str) -> bool:
    """Whether two tensors of a source are equal, dtype and all."""
    shape = source.shape(first)
    if shape != source.shape(second):
        return False
    whole = tuple(slice(0, size) for size in shape)
    return torch.equal(source.read(first, whole), source.read(second, whole))


def remove_weights(directory: Path, keep: Iterable[str] = ()) -> None:
    """Delete weight files of an earlier export, so that none is left beside the new ones."""
    kept = set(keep)
    for pattern in ("model*.safetensors", f"{SAFETENSORS}.index.json", ".model-*.tmp"):
        for file in directory.glob(pattern):
            if file.name not in kept:
                file.unlink()
