"""Sources: from a string under `data.train` to files, or to a table of `datasets`.

A string names, in this order: a file; a directory saved by `datasets`; a plain directory of text and JSON-lines files;
a dataset on the Hugging Face hub.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_ds.errors import DataError

if TYPE_CHECKING:
    import datasets

JSON_SUFFIXES = (".jsonl", ".json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class FileSource:
    """One file, or the files of a plain directory in the order of their names."""

    name: str
    paths: tuple[Path, ...]


@dataclass(frozen=True)
class TableSource:
    """A `datasets.Dataset`, memory-mapped: saved on disk or taken from the hub."""

    name: str
    table: "datasets.Dataset"


class JsonLine(NamedTuple):
    """One non-blank line of a JSON-lines file: its place and the object on it."""

    number: int
    offset: int
    num_bytes: int
    value: dict[str, Any]


def find_source(source: str, suffixes: tuple[str, ...]) -> FileSource | TableSource:
    """Find the files or the table that `source` names; files must end in one of `suffixes`.

    Raises:
        DataError: nothing has that name, it holds nothing readable, or the user must choose one of several splits.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise DataError(
                f"data: {source}: this data.format reads files that end in {', '.join(suffixes)}, "
                f"not in {path.suffix or 'nothing'!r}; convert or rename the file"
            )
        return FileSource(source, (path,))
    if (path / "dataset_dict.json").is_file():
        raise DataError(_several_splits(source, path))
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return TableSource(source, _load_saved(source, path))
    if path.is_dir():
        return FileSource(source, _files_of(source, path, suffixes))
    return TableSource(source, _load_from_hub(source, suffixes))


def json_lines(path: Path) -> Iterator[JsonLine]:
    """Yield every non-blank line of a JSON-lines file, in order, with one line in memory at a time.

    Raises:
        DataError: a line is not UTF-8, not JSON, or not an object; names the file and the line.
    """
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield JsonLine(number, offset, len(raw), parse_json_line(raw, f"{path}:{number}"))
            offset += len(raw)


def parse_json_line(raw: bytes, where: str) -> dict[str, Any]:
    """Parse the object on one line of a JSON-lines file; `where` names the line in errors."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"data: {where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"data: {where}: not JSON ({error}); each line must hold one object") from error
    if not isinstance(value, dict):
        raise DataError(f"data: {where}: holds a JSON {type(value).__name__}; each line must hold one object")
    return value


def _files_of(source: str, directory: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    files = (file for file in directory.iterdir() if file.is_file() and not file.name.startswith("."))
    found = tuple(sorted((file for file in files if file.suffix.lower() in suffixes), key=lambda file: file.name))
    if not found:
        raise DataError(
            f"data: {source}: the directory holds no {', '.join(suffixes)} file and was not saved by datasets "
            "(its sub-directories are not searched; name them instead)"
        )
    return found


def _several_splits(source: str, path: Path) -> str:
    try:
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"data: {source}: dataset_dict.json there is damaged; save the DatasetDict again"
    choices = " or ".join(str(Path(source) / str(split)) for split in splits)
    return f"data: {source}: a DatasetDict holds several splits; name one of them: {choices}"


def _load_saved(source: str, path: Path) -> "datasets.Dataset":
    import datasets  # imported late: it takes a second, which plain text files do not need

    try:
        return datasets.load_from_disk(str(path)).with_format(None)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data: {source}: the saved dataset cannot be read ({error}); save it again") from error


def _load_from_hub(source: str, suffixes: tuple[str, ...]) -> "datasets.Dataset":
    if not _HUB_ID.fullmatch(source) or Path(source).suffix.lower() in (*suffixes, *JSON_SUFFIXES, ".txt"):
        raise DataError(f"data: {source}: no such file or directory (looked in {Path.cwd()})")
    import datasets

    try:
        table = datasets.load_dataset(source, split="train")
    except Exception as error:  # the hub client raises types of several libraries; all are chained
        raise DataError(
            f"data: {source}: neither a file or directory (looked in {Path.cwd()}) nor a hub dataset with a 'train' "
            f"split that can be loaded ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    return table.with_format(None)
