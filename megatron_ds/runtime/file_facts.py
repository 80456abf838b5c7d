"""Facts about the files of models and data, to be compared between ranks: names, sizes, sampled digests.

Every rank reads them at its start, so that large files are sampled, and what is on a hub or at a URL is left to its
commit or name.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import xxhash

from megatron_ds.checkpoint.directory import MANIFEST, resolve_checkpoint
from megatron_ds.digests import sampled_xxh3
from megatron_ds.errors import ConversionError
from megatron_ds.hub import hub_id
from megatron_ds.remote import is_url
from megatron_ds.untrusted import read_json
from megatron_ds.untrusted.limits import MODEL_SETTINGS

MISSING = "missing"
MOST_SAMPLED = 256  # files of one directory; of further ones the names and sizes are compared
MOST_SIZED = 10_000  # of further ones the names alone: each size is a request to the storage
_MODEL_ENDINGS = (
    ".json",
    ".safetensors",
    ".bin",
    ".model",
    ".jinja",
    ".py",
    ".spm",
    ".tiktoken",
    "vocab.txt",
    "merges.txt",
)
_NO_DATA_ENDINGS = (".md", ".lock", ".tmp", ".log", ".out", ".err")
"""Endings of files that may be written while a run starts."""


def model_facts(field: str, path: str | None) -> dict[str, str]:
    """Return the fields of a model's config.json, and sizes and digests of the files in its directory.

    Args:
        field: the key that names the directory.
        path: a model, an adapter, a tokenizer, a checkpoint or the output of a run; None, an id or a URL = no facts.
    """
    if path is None or is_url(path) or hub_id(path) is not None:
        return {}
    directory = resolve_checkpoint(Path(path).expanduser())
    if not directory.exists():
        return {f"{field}={path}": MISSING}
    label = f"{field}={path}: "
    config = directory / "config.json"
    facts = {f"{label}config.json: {name}": value for name, value in _config_fields(config)}
    entries = sorted(directory.iterdir()) if directory.is_dir() else [directory]
    files = [
        one for one in entries if one.is_file() and one.name.endswith(_MODEL_ENDINGS) and not (facts and one == config)
    ]
    facts |= {f"{label}{one.name}": _describe(one) for one in files[:MOST_SAMPLED]}
    if len(files) > MOST_SAMPLED:
        facts[f"{label}the other files"] = _describe_all(directory, files[MOST_SAMPLED:])
    if (directory / MANIFEST).is_file():
        facts[f"{label}{MANIFEST}"] = _describe(directory / MANIFEST)
    return facts


def data_facts(field: str, path: str) -> dict[str, str]:
    """Return the number, size and digest of the files that a source of data names.

    Args:
        field: the key that names the source.
        path: a file, directory, pattern, or the prefix of an indexed corpus; an id or a URL = no facts.
    """
    if is_url(path):
        return {}
    place = Path(path).expanduser()
    files = sorted(_data_files(place))
    if not files and not has_magic(path) and not place.is_absolute() and path.count("/") == 1:
        return {}  # an id on the hub
    value = MISSING if not files else _describe(files[0]) if files == [place] else _describe_all(place, files)
    return {f"{field} ({path})": value}


def flatten(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every value in nested mappings and lists; None is left out."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flatten(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
        for number, inner in enumerate(value):
            yield from flatten(f"{name}[{number}]", inner)
    elif value is not None:
        yield name, value if isinstance(value, str) else json.dumps(value, default=str)


def _config_fields(file: Path) -> Iterator[tuple[str, str]]:
    try:
        content = read_json(file, MODEL_SETTINGS, ConversionError)
    except ConversionError:
        return  # reading the model says why; the file's digest is compared
    yield from flatten("", content) if isinstance(content, dict) else ()


def _is_data(file: Path) -> bool:
    return not file.name.startswith(".") and not file.name.endswith(_NO_DATA_ENDINGS)


def _data_files(place: Path) -> Iterator[Path]:
    """Yield the files of a source, those of a directory with its sub-directories."""
    found = [Path(f"{place}{ending}") for ending in ("", ".idx", ".bin")]
    found = [one for one in found if one.exists()]
    if not found and has_magic(str(place)):
        found = [Path(one) for one in glob(str(place), recursive=True)]
    for one in found:
        if one.is_file():
            yield one
        for folder, folders, names in os.walk(one):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from (file for file in (Path(folder, name) for name in names) if _is_data(file))


def _describe(file: Path) -> str:
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            return "no regular file"  # a pipe would be waited for
        return f"{found.st_size:,} bytes ({sampled_xxh3(file)[:16]})"
    except OSError as problem:
        return f"unreadable ({problem.strerror})"


def _describe_all(place: Path, files: Sequence[Path]) -> str:
    digest, num_bytes = xxhash.xxh3_64(), 0
    for number, file in enumerate(files):
        try:
            size = file.stat().st_size if number < MOST_SIZED else 0
        except OSError as problem:
            return f"unreadable ({file}: {problem.strerror})"
        num_bytes += size
        digest.update(f"{os.path.relpath(file, place.parent)} {size}\n".encode())
        if number < MOST_SAMPLED:
            digest.update(_describe(file).encode())
    sized = f", the first {MOST_SIZED:,}" if len(files) > MOST_SIZED else ""
    return f"{len(files):,} files{sized} of {num_bytes:,} bytes ({digest.hexdigest()})"
