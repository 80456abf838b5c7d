"""Files that appear under their name only when they are complete.

Temporary names are drawn at random, and a file is created only where nothing has its name: in a directory that others
may write, no link of theirs can lead a write elsewhere, and two processes never write the same temporary file.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LEFT_OVER_S = 24 * 3600.0
"""Age from which a temporary file is that of a process that was killed."""


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file in the same directory; on success it takes the name `path`.

    A reader sees the old file or the new one, never a part. After an exception the old file is unchanged, and the
    temporary one is gone. What killed processes have left over of it is removed a day later.

    Args:
        path: the file that is replaced or created; its mode is that of a new file.
        durable: flush the new content to the disk before the file takes its name.
    """
    _remove_left_overs(path)
    temporary = temporary_name(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    os.close(os.open(temporary, flags, 0o666))  # less what the umask takes away
    try:
        yield temporary
        if durable:
            flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty directory next to `path`, under a temporary name; it is removed if it still has that name."""
    _remove_left_overs(path)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """Return a path next to `path` that nobody can guess: `.NAME.RANDOM.tmp`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content is on its disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove_left_overs(path: Path) -> None:
    """Remove temporary files and directories of `path` that are too old to be in use."""
    start, oldest = f".{path.name}.", time.time() - _LEFT_OVER_S
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(start) and entry.name.endswith(".tmp"):
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < oldest:
                        _remove(entry)


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        os.unlink(entry.path)
