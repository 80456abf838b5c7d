"""Files that appear under their name only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same directory; on success the file written there takes the name `path`.

    A reader sees the old file or the new one, never a part. After an exception the old file is unchanged, and the
    temporary one is left to be overwritten by the next try.

    Args:
        path: the file that is replaced or created.
        durable: flush the new content to the disk before the file takes its name.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    if durable:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, path)
