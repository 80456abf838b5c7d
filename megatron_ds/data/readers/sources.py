"""Sources: from a name under `data.train` to files, and to tables of `datasets`.

A name is, in this order: a file; a directory saved by `datasets`; a directory that is searched for files of examples; a
pattern of such names; a data set on the Hugging Face hub.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_ds.data.readers.file_kinds import DataFile, file_endings, has_compressed_name, has_data_name, identify
from megatron_ds.data.readers.hub_stream import Stream, open_stream
from megatron_ds.data.readers.source import Source
from megatron_ds.digests import file_sha256
from megatron_ds.errors import DataError, nearest_names
from megatron_ds.remote import is_url, local_data
from megatron_ds.untrusted import read_record
from megatron_ds.untrusted.limits import DATA_RECORD
from megatron_ds.untrusted.records import Record

if TYPE_CHECKING:
    import datasets

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w][\w./-]*)?")
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Word in the path of a file -> the split that it names, as on the hub."""
_BATCH = 512  # rows of a table that are hashed at a time; the hash depends on it
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Table:
    """A `datasets.Dataset`, memory-mapped: saved on disk or taken from the hub."""

    name: str
    table: "datasets.Dataset"
    identity: ClassVar[str] = "table"


Part = DataFile | Table | Stream


@dataclass(frozen=True)
class FoundSource:
    """A source, and the files and tables that it names, in the order in which they are read."""

    source: Source
    parts: tuple[Part, ...]

    def digest(self) -> str:
        """Return the SHA-256 of the content: bytes of files, columns of rows. Names, paths and times do not count."""
        digest = hashlib.sha256(self.source.identity.encode())
        for part in self.parts:
            if isinstance(part, Stream):
                digest.update(part.identity.encode())
            elif isinstance(part, Table):
                for batch in part.table.iter(_BATCH):
                    digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
            else:
                kind = "" if part.identity == "json" else f" {part.identity}"
                digest.update(f"file:{file_sha256(part.path)}{kind}\n".encode())
        return digest.hexdigest()


def find_source(source: Source, plain_text: bool) -> FoundSource:
    """Find the files and tables that a source names.

    Args:
        source: the source.
        plain_text: whether a text without fields is an example.

    Raises:
        DataError: nothing has that name, it holds nothing readable, or the user must choose one of several splits.
    """
    return FoundSource(source, tuple(_find_parts(source, plain_text)))


def _find_parts(source: Source, plain_text: bool) -> list[Part]:
    if source.streaming:
        return [open_stream(source)]
    path = Path(source.path).expanduser()
    if is_url(source.path):
        path = local_data(source.path, f"data: {source.path}")
    if path.is_file():
        return [_file(source, path, plain_text)]
    if path.is_dir():
        return _directory(source, path, plain_text)
    if path.exists():
        raise DataError(f"data: {source.path}: is a stream or device, and sources are read more than once; try a file")
    if has_magic(source.path):
        return _matches(source, path, plain_text)
    return [Table(str(source), _load_from_hub(source))]


def _file(source: Source, path: Path, plain_text: bool) -> DataFile:
    for field, value in (("name", source.name), ("split", source.split)):
        if value is not None:
            raise DataError(f"data: {source.path}: {field}={value}: a file has no {field}s; remove it")
    found = identify(path, plain_text)
    if found is None:
        endings = ", ".join(file_endings(plain_text))
        ending = path.suffix or "nothing"
        hint = (
            "unpack the archive" if path.suffix.lower() in (".zip", ".tar", ".tgz", ".7z") else "rename or convert it"
        )
        raise DataError(
            f"data: {source.path}: this data.format reads files that end in {endings}, also compressed (.gz, .zst, "
            f".bz2, .xz), not in {ending!r}; {hint}"
        )
    return found


def _directory(source: Source, path: Path, plain_text: bool) -> list[Part]:
    if _is_saved(path) or source.split is not None or source.name is not None:
        return [Table(str(source), _load_directory(source, path))]
    found = [*_search(path, plain_text)]
    if not found:
        raise DataError(
            f"data: {source.path}: the directory holds no {', '.join(file_endings(plain_text))} file, also in its "
            "sub-directories, and was not saved by datasets"
        )
    _refuse_several_splits(source, path, found)
    return found


def _refuse_several_splits(source: Source, directory: Path, found: list[Part]) -> None:
    """Refuse a directory whose files are named after several splits: the test data would be learned."""
    words: dict[str, str] = {}
    for part in found:
        for word in re.findall(r"[A-Za-z]+", os.path.relpath(_path_of(part), directory)):
            if word.lower() in _SPLIT_OF_WORD:
                words.setdefault(_SPLIT_OF_WORD[word.lower()], word)
    if len(words) > 1:
        patterns = " or ".join(f"{source.path.rstrip('/')}/**/*{word}*" for word in words.values())
        raise DataError(
            f"data: {source.path}: the directory holds files of several splits ({', '.join(words)}); name one of them: "
            f"try {patterns}, or {source.path.rstrip('/')}/** for all of them"
        )


def _search(directory: Path, plain_text: bool) -> Iterator[Part]:
    """Yield the files of examples in a directory and its sub-directories, in the order of their paths.

    Hidden files are left out, and so are the files that describe a data set. A directory saved by `datasets` is one
    table.
    """
    files: list[Path] = []
    saved: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(directory, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or (Path(place) != directory and _is_saved(Path(place))):
            folders.clear()
            saved += [Path(place)] if real not in seen else []
            seen.add(real)
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = (Path(place, name) for name in names if not name.startswith(".") and name not in _METADATA)
        files += [file for file in visible if has_data_name(file, plain_text) and file.is_file()]
    for path in sorted([*files, *saved], key=str):
        if path.is_dir():
            yield Table(str(path), _load_directory(Source(str(path)), path))
        elif (found := identify(path, plain_text)) is not None:
            yield found


def _matches(source: Source, path: Path, plain_text: bool) -> list[Part]:
    parts: dict[str, Part] = {}
    for match in sorted(glob(str(path), recursive=True)):
        place = Path(match)
        found: list[Part] = []
        if place.is_dir():
            found = (
                [Table(match, _load_directory(Source(match), place))]
                if _is_saved(place)
                else [*_search(place, plain_text)]
            )
        elif place.name not in _METADATA and has_data_name(place, plain_text):
            kind = identify(place, plain_text)
            found = [kind] if kind is not None else []
        parts.update({_path_of(part): part for part in found})
    if not parts:
        raise DataError(
            f"data: {source.path}: no file of examples ({', '.join(file_endings(plain_text))}) matches the pattern "
            f"(looked in {Path.cwd()})"
        )
    return [parts[name] for name in sorted(parts)]


def _path_of(part: Part) -> str:
    return str(part.path) if isinstance(part, DataFile) else part.name


def _is_saved(path: Path) -> bool:
    """Return True if a directory was written by `save_to_disk` of a Dataset or a DatasetDict."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def _load_directory(source: Source, path: Path) -> "datasets.Dataset":
    """Load a directory saved by `datasets`, or the split of a plain one as `datasets` finds it."""
    import datasets  # imported late: it takes a second, which plain files do not need

    if not _is_saved(path):
        return _load(source, str(path), "no data set in this directory, as datasets finds it, has")
    if source.name is not None:
        raise DataError(f"data: {source.path}: name={source.name}: a saved data set has no configurations; remove it")
    if (path / "dataset_dict.json").is_file():
        splits = _saved_splits(source, path)
        if source.split is None and len(splits) != 1:
            choices = " or ".join(str(Path(source.path) / split) for split in splits)
            raise DataError(
                f"data: {source.path}: a DatasetDict holds several splits; name one of them: {choices}, or write "
                f"{{path: {source.path}, split: {splits[0] if splits else 'train'}}}"
            )
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data: {source.path}: the saved dataset cannot be read ({error}); save it again") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({str(loaded.split or _only_split(source)): loaded})
    return _take_split(source, {str(name): table for name, table in loaded.items()}).with_format(None)


def _only_split(source: Source) -> str:
    """Return the name of the split of a table that has none: that which the source asks for."""
    name = re.match(r"\w+", source.split or "")
    return name.group() if name else "train"


class _SavedSplits(Record):
    splits: list[str]


def _saved_splits(source: Source, path: Path) -> list[str]:
    try:
        return read_record(path / "dataset_dict.json", _SavedSplits, DATA_RECORD, DataError).splits
    except DataError as error:
        raise DataError(
            f"data: {source.path}: dataset_dict.json there is damaged; save the DatasetDict again"
        ) from error


def _take_split(source: Source, tables: Mapping[str, "datasets.Dataset"]) -> "datasets.Dataset":
    """Return the rows that `split` names, such as `train[:10%]+test`; all rows of the only table if it is not set."""
    import datasets

    if source.split is None:
        (table,) = tables.values()
        return table
    try:
        spec = datasets.ReadInstruction.from_spec(source.split)
        ranges = spec.to_absolute({name: len(table) for name, table in tables.items()})
        pieces = [
            tables[one.splitname].select(range(one.from_ or 0, _stop(one.to, tables[one.splitname]))) for one in ranges
        ]
    except (ValueError, AssertionError, KeyError) as error:
        raise DataError(
            f"data: {source.path}: split={source.split} names no rows ({' '.join(str(error).split())}); splits there "
            f"are {', '.join(tables)}"
        ) from error
    return datasets.concatenate_datasets(pieces) if len(pieces) > 1 else pieces[0]


def _stop(stop: int | None, table: "datasets.Dataset") -> int:
    return len(table) if stop is None else stop


def _load_from_hub(source: Source) -> "datasets.Dataset":
    path = source.path
    if Path(path).is_symlink():
        raise DataError(f"data: {path}: is a link to {Path(path).readlink()}, which does not exist")
    if not _HUB_ID.fullmatch(path) or has_data_name(Path(path), plain_text=True) or has_compressed_name(Path(path)):
        raise DataError(f"data: {path}: no such file or directory (looked in {Path.cwd()}){_nearest(path)}")
    return _load(source, path, f"neither a file or directory (looked in {Path.cwd()}) nor a hub dataset with")


def _nearest(path: str) -> str:
    """Return a hint at a file or directory of a similar name; empty if there is no such one."""
    place = Path(path).expanduser()
    names = sorted(one.name for one in place.parent.iterdir()) if place.parent.is_dir() else []
    stems = {name.partition(".")[0]: name for name in reversed(names)}  # endings make all names alike
    close = nearest_names(place.name, [name for name in names if name.startswith(place.name)])
    close += [stems[stem] for stem in nearest_names(place.name.partition(".")[0], stems)]
    return f"; nearest: {Path(path).parent / close[0]}" if close else ""


def _without_net(error: Exception, path: str) -> str:
    """Return the fix where the hub cannot be reached; empty if the error is another one."""
    if not isinstance(error, ConnectionError) or "on the Hub" not in str(error):
        return ""
    folder = path.rpartition("/")[2]
    return (
        f"; try `hf download {path} --repo-type dataset --local-dir {folder}` where there is a net, and the path of "
        "that directory here"
    )


def _load(source: Source, path: str, failure: str) -> "datasets.Dataset":
    import datasets

    configuration: dict[str, Any] = {} if source.name is None else {"name": source.name}
    if not Path(path).exists() and "@" in path:
        path, _, configuration["revision"] = path.partition("@")
    split = source.split or "train"
    try:
        table = datasets.load_dataset(path, split=split, **configuration)
    except Exception as error:  # the hub client raises types of several libraries; all are chained
        raise DataError(
            f"data: {source.path}: {failure} a {split!r} split that can be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())}){_nearest(path)}{_without_net(error, path)}"
        ) from error
    return table.with_format(None)
