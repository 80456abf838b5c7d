"""Local copies of remote files, in a cache: one process of a machine downloads, and the others wait for it.

A copy is found again by the URL and the version of each file, so that a file that has changed is downloaded again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from megatron_ds.cache import cache_folder
from megatron_ds.errors import RemoteError
from megatron_ds.locks import FileLock
from megatron_ds.remote.store import RemoteFile, Store
from megatron_ds.remote.urls import require_client

_ADDRESS = ".url"


@cache  # a run reads one version of its data; ranks that are forked know it from their parent
def local_data(url: str, named: str, *, prefix: bool = False) -> Path:
    """Return a local copy of a file, of all files of a directory, or of those of a pattern.

    Args:
        url: of the file, directory or pattern; or with `prefix` of indexed files without .bin and .idx.
        named: the beginning of errors.
        prefix: the URL is a prefix.

    Raises:
        ConfigError: the package for such URLs is missing.
        RemoteError: there is nothing of that name, or it cannot be read.
    """
    require_client(url, named)
    if prefix:
        stem = url.removesuffix(".bin").removesuffix(".idx")
        copies = [_copy(f"{stem}{ending}", named) for ending in (".bin", ".idx")]
        folder = _folder("\n".join(map(str, copies)), [])  # others may read other versions
        folder.mkdir(parents=True, exist_ok=True)
        for ending, copy in zip((".bin", ".idx"), copies):
            with suppress(FileExistsError):  # another rank has made it
                (folder / f"data{ending}").symlink_to(copy)
        return folder / "data"
    return _copy(url, named)


def local_files(url: str, named: str, files: Sequence[RemoteFile]) -> Path:
    """Return a directory with local copies of some files of a store, under their names.

    Args:
        url: of the directory of the files.
        named: the beginning of errors.
        files: what `Store.list` has returned of them.

    Raises:
        RemoteError: a file cannot be read.
    """
    folder = _folder(url, files)
    _fetch(Store(url, named), folder, files)
    folder.with_name(f"{folder.name}{_ADDRESS}").write_text(url)
    return folder


def address_of(path: str) -> str:
    """Return the URL that a directory from `local_files` is a copy of, and any other path unchanged."""
    note = Path(f"{path}{_ADDRESS}")
    return note.read_text() if note.parent == cache_folder("remote") and note.is_file() else path


def _copy(url: str, named: str) -> Path:
    store = Store(url, named)
    found = store.list()
    if not found:
        raise RemoteError(f"{named} does not exist, or holds no file; check the name")
    folder = _folder(url, found)
    if found[0].name == "":
        name = PurePosixPath(url.partition("?")[0]).name
        _fetch(store, folder, found, name)
        return folder / name
    _fetch(store, folder, found)
    return folder


def _folder(url: str, files: Sequence[RemoteFile]) -> Path:
    """Return the directory in the cache for some versions of files."""
    versions = "\n".join(f"{one.name} {one.size} {one.version}" for one in files)
    key = hashlib.sha256(f"{url}\n{versions}".encode()).hexdigest()[:24]
    return cache_folder("remote") / key


def _fetch(store: Store, folder: Path, files: Sequence[RemoteFile], only_name: str = "") -> None:
    """Download the files that are not here."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        targets = {one.name: folder / (one.name or only_name) for one in files}
        missing = {name: path for name, path in targets.items() if not path.is_file()}
        if missing:
            store.download(missing, [one for one in files if one.name in missing])
