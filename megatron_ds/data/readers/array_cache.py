"""A cache of arrays that are computed once, in files named by a hash of their inputs.

Every rank calls this at start-up, without communication. A file lock lets one process of a machine compute an entry
while the others wait. An entry is a directory of files and their checksums, which gets its name when it is complete. A
damaged one is computed again, which is logged.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from megatron_ds.atomic import flush_to_disk, temporary_folder
from megatron_ds.data.readers.array_files import map_array
from megatron_ds.data.readers.cache_checksums import (
    DamagedEntry,
    compare_checksums,
    refuse_strangers,
    write_checksums,
)
from megatron_ds.errors import DataError
from megatron_ds.locks import FileLock
from megatron_ds.log import get_logger

Entry = TypeVar("Entry")
Arrays = dict[str, np.ndarray]
_CHECKSUMS = "checksums.json"


class EntryFiles(NamedTuple, Generic[Entry]):
    """Functions that read and write the files of an entry.

    Attributes:
        read: reads the entry; raises an OSError or a ValueError if a file is missing or damaged.
        write: writes the files of the entry into an empty directory.
        check: checks an entry of an earlier version, which has no checksums; raises a ValueError if it is damaged.
    """

    read: Callable[[Path], Entry]
    write: Callable[[Path], None]
    check: Callable[[Entry], None]

    def open(self, entry: Path) -> tuple[Entry | None, str]:
        """Return the content of an entry, and its damage: None and an empty text if there is no such entry."""
        try:
            # hidden ones are not of the entry: a temporary file of a process that adds checksums, or of NFS
            listed = (path for path in entry.iterdir() if not path.name.startswith("."))
            names = {path.name: path for path in listed if path.name != _CHECKSUMS}
            refuse_strangers(entry.parent, [entry, *names.values()])
            if compare_checksums(entry / _CHECKSUMS, names, all_listed=True):
                return self.read(entry), ""
            found = self.read(entry)
            self.check(found)
        except (FileNotFoundError, NotADirectoryError) as problem:
            return None, str(problem) if entry.exists() else ""
        except (DamagedEntry, ValueError, EOFError, RecursionError) as problem:
            return None, " ".join(str(problem).split()) or type(problem).__name__
        note_earlier(entry)
        with suppress(OSError):  # a cache that cannot be written; the entry is checked in each process then
            write_checksums(entry / _CHECKSUMS, names)
        return found, ""


def cached_arrays(
    directory: Path,
    key: str,
    kinds: Mapping[str, str],
    make: Callable[[], Mapping[str, np.ndarray]],
    optional: Mapping[str, str] | None = None,
    check: Callable[[Arrays], None] | None = None,
) -> Arrays:
    """Return the arrays of an entry, memory-mapped; compute them if they are missing. Safe for concurrent processes.

    Args:
        directory: the cache.
        key: name of the entry: a hash of everything that decides the arrays.
        kinds: name of each array -> its dtype and number of dims; see `map_array`.
        make: computes them.
        optional: likewise for arrays that only some entries have.
        check: see `EntryFiles.check`; None = such an entry is compared with what `make` computes.

    Raises:
        DataError: `directory` cannot be written. Exceptions of `make` pass through.
    """

    def read(entry: Path) -> Arrays:
        found = {name: kind for name, kind in (optional or {}).items() if (entry / f"{name}.npy").exists()}
        return {name: map_array(entry / f"{name}.npy", kind) for name, kind in {**kinds, **found}.items()}

    def compare(found: Arrays) -> None:
        for name, array in make().items():
            if name not in found or not np.array_equal(found[name], array):
                raise DamagedEntry(f"{name} is not as it is computed")

    return cached_entry(directory, key, EntryFiles(read, lambda entry: _write(entry, make()), check or compare))


def cached_entry(directory: Path, key: str, files: EntryFiles[Entry]) -> Entry:
    """Return the content of an entry; write it if it is missing or damaged. Safe for concurrent processes.

    Args:
        directory: the cache.
        key: name of the entry: a hash of everything that decides its content.
        files: of the entry.

    Raises:
        DataError: `directory` cannot be written, or a stranger may have written the entry. Exceptions of `files` pass
            through.
    """
    entry = directory / key
    damage = ""
    try:
        found, _ = files.open(entry)
        if found is None:
            directory.mkdir(parents=True, exist_ok=True)
            with FileLock(directory / f"{key}.lock"):
                found, damage = files.open(entry)  # another rank may have made it while this one waited
                if found is None:
                    if damage:
                        get_logger("data").warning("the cache entry %s is damaged (%s): making it again", entry, damage)
                    _replace(entry, files.write)
                    found, damage = files.open(entry)
    except OSError as error:
        raise cache_problem(directory, str(error), damage) from error
    if found is None:
        raise cache_problem(directory, f"{key} was written, and cannot be read back", damage)
    return found


def cache_problem(directory: Path, problem: str, damage: str) -> DataError:
    """Return the error for a cache that cannot be used; `damage` is that of the entry, if it has any."""
    return DataError(
        f"data: the cache {directory} cannot be used ({problem}{damage and f'; its entry is damaged: {damage}'}); set "
        "data.cache_dir to a writable directory with enough space"
    )


def note_earlier(entry: Path) -> None:
    """Log that an entry of an earlier version is used."""
    get_logger("data").info(
        "the cache entry %s has no checksums, as an earlier version wrote it: it is used as it is", entry
    )


def _write(entry: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        np.save(entry / f"{name}.npy", array)


def _replace(entry: Path, write: Callable[[Path], None]) -> None:
    # the lock may not hold across machines on a shared disk: their temporary names differ, and all write the same
    with temporary_folder(entry) as temporary:
        write(temporary)
        files = {path.name: path for path in temporary.iterdir()}
        for path in files.values():
            flush_to_disk(path)
        write_checksums(temporary / _CHECKSUMS, files)
        if entry.is_dir() and not entry.is_symlink():  # damaged
            shutil.rmtree(entry)
        elif os.path.lexists(entry):
            entry.unlink()
        try:
            temporary.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another machine was first
                raise
