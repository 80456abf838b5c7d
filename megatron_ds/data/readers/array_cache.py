"""A cache of arrays that are computed once, in files named by a hash of their inputs.

Every rank calls this at start-up, without communication. A file lock lets one process of a machine compute an entry
while the others wait. An entry is a directory of arrays, which gets its name when it is complete; a damaged one is
computed again.
"""

import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import filelock
import numpy as np

from megatron_ds.errors import DataError

Entry = TypeVar("Entry")


def cached_arrays(
    directory: Path,
    key: str,
    names: Sequence[str],
    make: Callable[[], Mapping[str, np.ndarray]],
    optional: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Return the arrays of an entry, memory-mapped; compute them if they are missing. Safe for concurrent processes.

    Args:
        directory: the cache.
        key: name of the entry: a hash of everything that decides the arrays.
        names: of its arrays.
        make: computes them.
        optional: names of arrays that only some entries have.

    Raises:
        DataError: `directory` cannot be written. Exceptions of `make` pass through.
    """

    def read(entry: Path) -> dict[str, np.ndarray]:
        found = [name for name in optional if (entry / f"{name}.npy").exists()]
        return {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in (*names, *found)}

    return cached_entry(directory, key, read, lambda entry: _write(entry, make()))


def cached_entry(directory: Path, key: str, read: Callable[[Path], Entry], write: Callable[[Path], None]) -> Entry:
    """Return the content of an entry; write it if it is missing or damaged. Safe for concurrent processes.

    Args:
        directory: the cache.
        key: name of the entry: a hash of everything that decides its content.
        read: reads the entry; raises FileNotFoundError, ValueError or EOFError if it is missing or damaged.
        write: writes the files of the entry into an empty directory.

    Raises:
        DataError: `directory` cannot be written. Exceptions of `write` pass through.
    """
    entry = directory / key
    try:
        if (found := _try(read, entry)) is not None:
            return found
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory / f"{key}.lock"):
            if (found := _try(read, entry)) is None:  # another rank may have made it while this one waited
                _replace(entry, write)
                found = _try(read, entry)
        assert found is not None, entry
    except OSError as error:
        raise DataError(
            f"data: the cache {directory} cannot be used ({error}); set data.cache_dir to a writable directory with "
            "enough space"
        ) from error
    return found


def _try(read: Callable[[Path], Entry], entry: Path) -> Entry | None:
    try:
        return read(entry)
    except (FileNotFoundError, ValueError, EOFError):  # missing, truncated or empty
        return None


def _write(entry: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        np.save(entry / f"{name}.npy", array)


def _replace(entry: Path, write: Callable[[Path], None]) -> None:
    # the lock may not hold across machines on a shared disk: their temporary names differ, and all write the same
    temporary = entry.with_name(f"{entry.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if entry.is_dir():  # damaged
            shutil.rmtree(entry)
        try:
            temporary.rename(entry)
        except OSError:
            if not entry.is_dir():  # else another machine was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
