"""Checksums of cache entries: every file of an entry is read in full and compared before the entry is used.

Reading costs less than the hash of the source, which names the entry. A file is read once in a process. The checksums
show damage by disks and copies. They are no signatures: whoever may write a cache decides what its runs are trained on.
So entries of strangers are refused in a directory that everyone may write.
"""

import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_ds.atomic import replacing
from megatron_ds.digests import known_xxh3
from megatron_ds.errors import DataError
from megatron_ds.untrusted import read_record
from megatron_ds.untrusted.limits import CACHE_RECORD
from megatron_ds.untrusted.records import Record

FORMAT_VERSION = 1


class _Checksums(Record):
    """The content of the file with the checksums."""

    format_version: int
    xxh3_128: dict[str, str]


class DamagedEntry(DataError):
    """An entry that must not be used; the text says why, in a few words."""


def write_checksums(path: Path, files: Mapping[str, Path]) -> None:
    """Write the checksums of an entry's files.

    Args:
        path: the file with the checksums.
        files: name in it -> file.
    """
    content = {"format_version": FORMAT_VERSION, "xxh3_128": {name: known_xxh3(file) for name, file in files.items()}}
    with replacing(path, durable=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def compare_checksums(path: Path, files: Mapping[str, Path], *, all_listed: bool = False) -> bool:
    """Compare an entry's files with their checksums; return False if it has none, as those of earlier versions.

    Args:
        path: the file with the checksums.
        files: name in it -> file, of those that are used.
        all_listed: whether every name in it must be in `files`.

    Raises:
        DamagedEntry: a file differs, has no checksum or is missing.
        OSError: a file cannot be read.
    """
    if not os.path.lexists(path):
        return False
    found = read_record(path, _Checksums, CACHE_RECORD, DamagedEntry)
    if found.format_version != FORMAT_VERSION:
        raise DamagedEntry(f"{path.name} is of version {found.format_version}")
    sums = found.xxh3_128
    for name in files.keys() - sums.keys():
        raise DamagedEntry(f"{name} has no checksum")
    for name in sums.keys() - files.keys() if all_listed else ():
        raise DamagedEntry(f"{name} is missing")
    for name, file in files.items():
        try:
            digest = known_xxh3(file)
        except FileNotFoundError:
            raise DamagedEntry(f"{name} is missing") from None
        except ValueError as problem:
            raise DamagedEntry(str(problem)) from problem
        if digest != sums[name]:
            raise DamagedEntry(f"{name} differs from its checksum")
    return True


def refuse_strangers(directory: Path, files: Iterable[Path]) -> None:
    """Refuse files of other users in a directory that everyone may write, such as /tmp.

    Those of this user, of root and of the directory's owner are used, and those of the user that a network disk gives
    this one's files to, as NFS does with root's. Where only an owner or a group may write, they are trusted.

    Raises:
        DataError: a file belongs to someone else.
        OSError: a file cannot be looked at.
    """
    place = directory.stat()
    if not place.st_mode & stat.S_IWOTH:
        return
    trusted = {os.getuid(), 0, place.st_uid}
    for file in files:
        owner = file.lstat().st_uid
        if owner not in trusted and owner != _owner_of_new_files(directory):
            raise DataError(
                f"data: the cache {directory}: {file.name} belongs to user {owner}, and everyone may write there; set "
                "data.cache_dir to a directory that only you or your group may write"
            )


def _owner_of_new_files(directory: Path) -> int:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:  # a cache that cannot be written
        return os.getuid()
