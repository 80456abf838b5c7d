"""Names of files that other files hold: those of an index, a manifest, a list of modules, a store's listing."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from megatron_ds.errors import show
from megatron_ds.untrusted.files import ErrorType

_MOST_BYTES_OF_A_NAME = 255
_ODD = re.compile(r"[\0-\x1f\x7f\\]")  # control characters, and the separator of another system


def file_inside(directory: Path, name: str, place: str, error: ErrorType) -> Path:
    """Return the path of a file that another file names; it lies in a directory or below it.

    Links of the hub's cache, from a snapshot to its blobs, count as inside. The file may be missing.

    Args:
        directory: the directory.
        name: relative to it.
        place: what names the file, for errors, such as "model.safetensors.index.json: model.norm.weight".
        error: the type of the error.

    Raises:
        error: the name is absolute or climbs, or a link leads out of the directory.
    """
    if not is_inside_name(name):
        raise error(f"{place} points outside the directory, to {name!r:.200}")
    path = directory / name
    try:
        real, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    except (OSError, ValueError) as problem:
        raise error(f"{place}: {show(name)} is not the name of a file ({problem})") from problem
    blobs = root.parent.parent / "blobs"
    if not (real.is_relative_to(root) or (root.parent.name == "snapshots" and real.is_relative_to(blobs))):
        raise error(
            f"{place} points outside the directory: {path} is a link to {real}; "
            "try to put the file itself in the place of the link"
        )
    return path


def is_inside_name(name: str) -> bool:
    """Test whether a name is relative, has no `..`, and is one that every file system takes."""
    path = PurePosixPath(name)
    try:
        is_short = all(len(os.fsencode(part)) <= _MOST_BYTES_OF_A_NAME for part in path.parts)
    except UnicodeEncodeError:
        return False
    is_relative = bool(path.parts) and not path.is_absolute() and not PureWindowsPath(name).drive
    return is_relative and is_short and ".." not in path.parts and not _ODD.search(name)
