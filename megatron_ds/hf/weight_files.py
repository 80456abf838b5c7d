"""Weights in Hugging Face directories: read as views of files, written in shards, never a full model in memory.

Reads `model.safetensors`, its sharded form with an index, and `pytorch_model.bin` likewise. Writes sharded safetensors
with an index, under temporary names until all files are complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from copy import copy
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ds import hub
from megatron_ds.atomic import replacing
from megatron_ds.dtypes import DTYPE_OF_CODE
from megatron_ds.errors import ConversionError
from megatron_ds.hf.quantised import BlockScaled, Packed4, Quantisation, Stored, dequantised
from megatron_ds.hf.tensor_files import StoredTensor, code_of, itemsize_of, read_table
from megatron_ds.untrusted import file_inside, read_json
from megatron_ds.untrusted.limits import WEIGHT_INDEX

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
_SAME_BYTES_CHUNK = 2**24

# ---- reading ---------------------------------------------------------------------------------------------------------


class TensorSource:
    """The tensors of a directory by name. Opening it reads headers only.

    Args:
        directory: for messages.
        tables: file -> its tensors, in the order of the file.

    Attributes:
        renaming: a text on what the names leave out of those in the files, such as "without '_orig_mod.'"; "" = they
            are the same.
    """

    def __init__(self, directory: Path, tables: Mapping[Path, Mapping[str, StoredTensor]]) -> None:
        self.directory, self.files, self.renaming = directory, list(tables), ""
        self._found: dict[str, tuple[Path, Stored]] = {
            name: (file, stored) for file, table in tables.items() for name, stored in table.items()
        }

    def dequantised(self, how: Quantisation) -> TensorSource:
        """Return the same tensors with quantised ones as what they stand for, in bfloat16.

        Raises:
            ConversionError: a weight and its scales do not fit each other.
        """
        other = copy(self)
        other._found = dequantised(self._found, how)
        return other

    def renamed(self, new_names: Mapping[str, str], renaming: str) -> TensorSource:
        """Return the same tensors by other names.

        Args:
            new_names: name -> new name, for each of the tensors.
            renaming: see the attribute.

        Raises:
            ConversionError: two different tensors would get the same name.
        """
        other = copy(self)
        other._found, other.renaming, by_new = {}, renaming, dict[str, str]()
        for name, found in self._found.items():
            first = by_new.setdefault(new_names[name], name)
            if first != name and not self.same_bytes(first, name):
                raise ConversionError(f"{self.directory}: {first} and {name} are two names of one tensor, and differ")
            other._found.setdefault(new_names[name], found)
        return other

    @property
    def names(self) -> list[str]:
        return list(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape on disk, without reading data."""
        return self._found[name][1].shape

    def dtype(self, name: str) -> str:
        """Return safetensors' name of the dtype on disk, such as "BF16", without reading data."""
        return self._found[name][1].dtype

    def tensor(self, name: str, *, ahead: bool = False, rows: slice = slice(None)) -> Tensor:
        """Map a full tensor of a file. Pages are read on access and freed with the view.

        Args:
            ahead: read all pages at once.
            rows: indices of the first dim; others are not read, nor decoded if the tensor is quantised.
        """
        file, stored = self._found[name]
        return stored.view(file, ahead=ahead, rows=rows)

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor, without reading data."""
        return prod(self.shape(name)) * itemsize_of(self.dtype(name))

    def files_of(self, names: Iterable[str]) -> list[Path]:
        """Return the files that these tensors, and what they are decoded from, lie in."""
        return list(dict.fromkeys(file for name in names for file in _files_of(*self._found[name])))

    def is_decoded(self, name: str) -> bool:
        """Test whether a tensor is quantised on disk, and decoded when it is read."""
        return not isinstance(self._found[name][1], StoredTensor)

    def same_bytes(self, first: str, second: str) -> bool:
        """Test whether two weights have equal dtypes, shapes and bytes; holds a few MB at a time."""
        shape, word = self.shape(first), self.dtype(first)
        if shape != self.shape(second) or word != self.dtype(second) or word not in DTYPE_OF_CODE:
            return False
        rows = max(1, _SAME_BYTES_CHUNK // max(1, DTYPE_OF_CODE[word].itemsize * prod(shape[1:])))
        for start in range(0, shape[0], rows):
            parts = (self.tensor(name)[start : start + rows].contiguous() for name in (first, second))
            one, other = (part.view(torch.uint8) for part in parts)
            if not torch.equal(one, other):
                return False
        return True


def has_weights(directory: Path) -> bool:
    """Test whether a directory has weights that `open_directory` finds."""
    return any(hub.exists(directory / name) for one in (SAFETENSORS, BIN) for name in (one, f"{one}.index.json"))


def open_directory(directory: str | Path) -> TensorSource:
    """Open a directory's weights: safetensors before .bin, one file before an index, as transformers does.

    Files of the hub that are not here are downloaded when their tensors are read; a .bin file is when it is opened.

    Raises:
        ConversionError: no weights, a file missing from an index or outside the directory, a damaged file.
    """
    directory = Path(directory)
    for single in (SAFETENSORS, BIN):
        if hub.exists(directory / single):
            return TensorSource(directory, {directory / single: read_table(directory / single)})
        index = directory / f"{single}.index.json"
        if index.is_file():
            return _open_indexed(index)
    raise ConversionError(
        f"{directory}: no weights here; expected {SAFETENSORS}, {BIN}, or one of their indexes"
        f"{hub.download_hint(directory)}"
    )


def _open_indexed(index: Path) -> TensorSource:
    file_of = _read_index(index)
    hub.read_headers(set(file_of.values()))
    tables = {file: read_table(file) for file in dict.fromkeys(file_of.values())}
    for name, file in file_of.items():
        if name not in tables[file]:
            raise ConversionError(f"{index}: {name} should be in {file.name}, which does not hold it")
    holder: dict[str, Path] = {}
    for file, table in tables.items():
        for name in table:
            if name in holder:
                raise ConversionError(f"{index.parent}: {name} is in both {holder[name].name} and {file.name}")
            holder[name] = file
    return TensorSource(index.parent, tables)


def _read_index(index: Path) -> dict[str, Path]:
    """Read an index: name -> file. Its other content is ignored, as in transformers."""
    content = read_json(index, WEIGHT_INDEX, ConversionError)
    entries = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
        raise ConversionError(f"{index}: has no weight_map from tensors to files")
    names = {file: name for name, file in entries.items()}
    for file, name in names.items():
        if "/" in file:
            raise ConversionError(f"{index}: {name} points outside the directory, to {file!r:.200}")
        file_inside(index.parent, file, f"{index}: {name}", ConversionError)
        if not hub.exists(index.parent / file):
            raise ConversionError(f"{index}: {name} is in {file}, which is missing{hub.download_hint(index.parent)}")
    paths = {file: index.parent / file for file in names}
    return {name: paths[file] for name, file in entries.items()}


def _files_of(file: Path, stored: Stored) -> tuple[Path, ...]:
    if isinstance(stored, BlockScaled):
        return stored.weight[0], stored.scale[0]
    return (stored.blocks[0], stored.exponents[0]) if isinstance(stored, Packed4) else (file,)


# ---- writing ---------------------------------------------------------------------------------------------------------

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_ENTRY_BYTES = 160  # limit of a header entry without its name: keys, dtype, four dims, two offsets; also of metadata
_ALIGNMENT = 64


def parse_size(text: str, field: str = "max_shard_size") -> int:
    """Parse a size into bytes: "5GB" in powers of 1000, as in transformers, "5GiB" in powers of 1024.

    Args:
        text: the size.
        field: where the user wrote it.

    Raises:
        ConversionError: not a number with a unit, or less than one byte.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(I?)B", text.strip().upper())
    if match:
        number, unit, binary = match.groups()
        size_bytes = int(float(number) * (_BINARY_UNITS if binary else _UNITS)[unit])
        if size_bytes > 0:
            return size_bytes
    raise ConversionError(f"{field}={text!r} is not a size; write for example 5GB or 500MB")


class ShardWriter:
    """Stream tensors into safetensors files of at most `max_shard_bytes`; no tensor is held in memory.

    A file begins with its header, which is known last: space is reserved for it, and the rest is filled with blanks, as
    the format allows. Files have temporary names until `finish`, which renames them and writes the index; a single file
    needs none. A tensor larger than the limit gets a file of its own.

    Args:
        directory: directory without weights.
        max_shard_bytes: limit of the bytes of tensors in a file that holds several.
        names: of all tensors that may be added, to reserve space for the header.
    """

    def __init__(self, directory: Path, max_shard_bytes: int, names: Iterable[str]) -> None:
        self.directory, self.max_shard_bytes = directory, max_shard_bytes
        room = sum(_ENTRY_BYTES + len(json.dumps(name)) for name in names)
        self._data_start = -(-(room + _ENTRY_BYTES) // _ALIGNMENT) * _ALIGNMENT
        self._shards: list[dict[str, Any]] = []
        self._total_bytes = self._total_parameters = self._shard_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; afterwards the caller may change or free it."""
        data = tensor.detach().contiguous()
        size_bytes = data.numel() * data.element_size()
        if not self._shards or (self._shard_bytes and self._shard_bytes + size_bytes > self.max_shard_bytes):
            self._begin_shard()
        end = self._shard_bytes + size_bytes
        self._shards[-1][name] = {
            "dtype": code_of(data.dtype),
            "shape": list(data.shape),
            "data_offsets": [self._shard_bytes, end],
        }
        if size_bytes:
            with open(self._temporary(len(self._shards)), "ab") as file:
                file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._shard_bytes = end
        self._total_bytes += size_bytes
        self._total_parameters += data.numel()

    def finish(self) -> None:
        """Write the headers, give the files their final names, and write the index."""
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, entries in enumerate(self._shards, start=1):
            self._write_header(number, entries)
            final = SAFETENSORS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self._temporary(number), self.directory / final)
            weight_map.update(dict.fromkeys(entries, final))
        if count > 1:
            metadata = {"total_parameters": self._total_parameters, "total_size": self._total_bytes}
            write_json(self.directory / f"{SAFETENSORS}.index.json", {"metadata": metadata, "weight_map": weight_map})

    def _begin_shard(self) -> None:
        self._shards.append({})
        self._shard_bytes = 0
        self._temporary(len(self._shards)).write_bytes(b" " * self._data_start)

    def _write_header(self, number: int, entries: Mapping[str, Any]) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        room = self._data_start - 8
        assert len(header) <= room, (len(header), room)
        with open(self._temporary(number), "r+b") as file:
            file.write(room.to_bytes(8, "little") + header)

    def _temporary(self, number: int) -> Path:
        return self.directory / f".model-{number:05d}.safetensors.tmp"


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON to a file that appears at once."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(content), encoding="utf-8")


def json_text(content: Any) -> str:
    """Format indented JSON with sorted keys."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
