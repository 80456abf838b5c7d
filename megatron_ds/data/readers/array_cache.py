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

import filelock
import numpy as np

from megatron_ds.errors import DataError


def cached_arrays(
    directory: Path, key: str, names: Sequence[str], make: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the arrays of an entry, memory-mapped; compute them if they are missing. Safe for concurrent processes.

    Args:
        directory: the cache.
        key: name of the entry: a hash of everything that decides the arrays.
        names: of its arrays.
        make: computes them.

    Raises:
        DataError: `directory` cannot be written. Exceptions of `make` pass through.
    """
    entry = directory / key
    try:
        if (found := _read(entry, names)) is not None:
            return found
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(directory / f"{key}.lock"):
            if (found := _read(entry, names)) is None:  # another rank may have made it while this one waited
                _write(entry, make())
                found = _read(entry, names)
        assert found is not None, entry
    except OSError as error:
        raise DataError(
            f"data: the cache {directory} cannot be used ({error}); set data.cache_dir to a writable directory with "
            "enough space"
        ) from error
    return found


def _read(entry: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    try:
        return {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in names}
    except (FileNotFoundError, ValueError, EOFError):  # missing, truncated or empty
        return None


def _write(entry: Path, arrays: Mapping[str, np.ndarray]) -> None:
    # the lock may not hold across machines on a shared disk: their temporary names differ, and all write the same
    temporary = entry.with_name(f"{entry.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
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
