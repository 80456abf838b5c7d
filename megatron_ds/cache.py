"""The per-user caches on a machine: ours, for tokenized text and compiled kernels, and those of libraries.

A container may run as a user without a home, or with one that cannot be written. Libraries then fail when they are
imported, so every command first gives them a directory in the temporary one.
"""

import getpass
import os
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from megatron_ds.errors import ConfigError

_CACHE = "XDG_CACHE_HOME"
# Variables that name directories of libraries -> the directory without them.
_DEFAULTS = {_CACHE: "~/.cache", "MPLCONFIGDIR": "~/.config/matplotlib", "TRITON_HOME": "~"}
_HUGGING_FACE = "HF_HOME"
_MORE_TEMPORARY = ("/dev/shm", "/var/tmp")
_SCRATCH_BYTES, _SCRATCH_FILES = 2**26, 100
_HUGGING_FACE_PARTS = {"HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules"}


def cache_folder(kind: str) -> Path:
    """Return `megatron_ds/KIND` under $XDG_CACHE_HOME or ~/.cache, or in the temporary directory if that is read-only.

    Raises:
        ConfigError: neither can be written.
    """
    use_writable_caches()
    return Path(_place(os.environ, _CACHE)) / "megatron_ds" / kind


def use_writable_caches(environ: MutableMapping[str, str] = os.environ) -> str:
    """Set the variables of caches in `environ` where the default, or the variable's value, cannot be written.

    Call it before libraries are imported.

    Returns:
        a line for the log if the cache of this package has moved; empty otherwise.

    Raises:
        ConfigError: no temporary directory can be written either.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # no entry in the list of users
        environ["USER"] = f"uid_{os.getuid()}"
    moved = ""
    cache_before = _place(environ, _CACHE)
    for name in _DEFAULTS:
        place = _place(environ, name)
        if not _can_write(place):
            environ[name] = str(_temporary_cache() / name.lower())
            if name == _CACHE:
                moved = f"caches are in {environ[name]}, as {place} cannot be written; set {name} to another directory"
    models = f"{cache_before}/huggingface"
    if moved and _HUGGING_FACE not in environ and os.path.isdir(models):
        environ[_HUGGING_FACE] = models  # what was downloaded can still be read
    home = environ.get(_HUGGING_FACE)
    if home and not _can_write(os.path.expanduser(home)):
        cache = _place(environ, _CACHE)
        for name, part in _HUGGING_FACE_PARTS.items():
            environ.setdefault(name, f"{cache}/huggingface/{part}")
    return moved


def _place(environ: Mapping[str, str], name: str) -> str:
    """Return the directory that a variable of caches names, or its default."""
    return os.path.expanduser(environ.get(name) or _DEFAULTS[name])


def _can_write(folder: str) -> bool:
    """Return whether a directory can be written, or created."""
    if not os.path.isabs(folder):
        return False  # `~` of a user without a home
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def _temporary_cache() -> Path:
    """Return this user's directory in the temporary one, the same in every process."""
    folder = temporary_directory() / f"megatron_ds-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_ours = folder.stat().st_uid == os.getuid() and not folder.is_symlink()
    except OSError:
        is_ours = False
    if not is_ours:
        raise ConfigError(f"{folder} belongs to another user, and caches need a directory; set {_CACHE} to one")
    return folder


def scratch_directory() -> Path:
    """Return a directory for small temporary files: the usual one, or another of this machine if that is almost full.

    Raises:
        ConfigError: none can be written.
    """
    usual = temporary_directory()
    places = (usual, *map(Path, _MORE_TEMPORARY))
    return next((place for place in places if _has_room(place)), usual)


def _has_room(place: Path) -> bool:
    try:
        found = os.statvfs(place)
    except OSError:
        return False
    has_files = found.f_files == 0 or found.f_favail >= _SCRATCH_FILES  # some file systems do not count them
    return os.access(place, os.W_OK | os.X_OK) and has_files and found.f_bavail * found.f_frsize >= _SCRATCH_BYTES


def temporary_directory() -> Path:
    """Return the directory of temporary files.

    Raises:
        ConfigError: none can be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise ConfigError(
            f"TMPDIR={os.environ.get('TMPDIR', '')}: neither it nor /tmp can be written; set TMPDIR to a directory"
        ) from None
