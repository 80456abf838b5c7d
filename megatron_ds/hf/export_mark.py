"""The mark of an export: a hidden file that lists all its files, which shows later whether any of them has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from megatron_ds.digests import file_xxh3
from megatron_ds.errors import ConversionError
from megatron_ds.untrusted import is_missing, read_record
from megatron_ds.untrusted.limits import RUN_RECORD
from megatron_ds.untrusted.records import Record
from megatron_ds.version import __version__

MARK = ".megatron_ds_export.json"


@dataclass(frozen=True)
class MarkedFile:
    """The length, the checksum and the time of change that a file had when it was exported."""

    bytes: int
    xxh3_128: str
    modified_ns: int


def path_digest(path: Path) -> str:
    """Return a hash of a resolved path, to recognize it without telling the names in it to readers of an export."""
    return xxhash.xxh3_64(os.fsencode(path)).hexdigest()


def write_mark(directory: Path, target: Path) -> None:
    """Write the mark of a complete export, for which every file is read once.

    Args:
        directory: the directory, with all its files.
        target: its final path, resolved. Copies of the export at other paths are not taken for exports.
    """
    entries = {name: entry for name, entry in _files(directory) if name != MARK}
    files = {name: asdict(_record(entries[name])) for name in sorted(entries)}
    mark = {"megatron_ds": __version__, "target": path_digest(target), "files": files}
    (directory / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")


def first_change(directory: Path, target: Path, *, thorough: bool) -> str | None:
    """Return the first difference of a directory from a marked export; None if it is unchanged.

    Args:
        directory: the directory.
        target: the path that it was exported to, resolved.
        thorough: compare all checksums; otherwise only those of files whose time of change differs.

    Returns:
        a text that follows the name of the directory in a message.
    """
    try:
        mark = read_record(directory / MARK, _Mark, RUN_RECORD, ConversionError)
        expected = mark.files
        if mark.target != path_digest(target):
            return "is a moved or copied export"
        found = {name: entry for name, entry in _files(directory) if name != MARK}
        for name in sorted(found.keys() | expected.keys()):
            if name not in expected:
                return f"holds {name}, which was added after the export"
            if name not in found:
                return f"lacks {name}, which was removed after the export"
            if not _is_unchanged(found[name], expected[name], thorough):
                return f"holds {name}, which was changed after the export"
    except ConversionError as problem:
        if is_missing(problem):
            return f"has no mark of an export (earlier versions wrote no {MARK})"
        if isinstance(problem.__cause__, OSError):
            return f"cannot be compared with its mark ({problem.__cause__.strerror or problem})"
        return f"holds a damaged {MARK}"
    except OSError as problem:
        return f"cannot be compared with its mark ({problem.strerror or problem})"
    return None


class _Mark(Record):
    target: str
    files: dict[str, MarkedFile]


def _is_unchanged(entry: os.DirEntry[str], expected: MarkedFile, thorough: bool) -> bool:
    if not entry.is_file(follow_symlinks=False):
        return False
    status = entry.stat(follow_symlinks=False)
    if status.st_size != expected.bytes:
        return False
    if status.st_mtime_ns == expected.modified_ns and not thorough:
        return True
    return _record(entry).xxh3_128 == expected.xxh3_128


def _files(directory: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield path under the directory, entry of all that is no directory; symbolic links are not followed."""
    unread = [directory]
    while unread:
        with os.scandir(unread.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    unread.append(Path(entry.path))
                else:
                    yield Path(entry.path).relative_to(directory).as_posix(), entry


def _record(entry: os.DirEntry[str]) -> MarkedFile:
    digest, status = file_xxh3(Path(entry.path)), os.stat(entry.path)
    return MarkedFile(status.st_size, digest, status.st_mtime_ns)
