"""Upload of a complete model to a URL."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path

from megatron_ds.errors import RemoteError
from megatron_ds.remote.store import Store
from megatron_ds.remote.urls import require_client

PROBE = ".megatron_ds_can_write"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Patterns of files of weights. Those of an earlier upload under other names would make two models of one place."""
_LAST = ("adapter_config.json", "config.json")
"""The files without which the others are no model."""


def prepare_upload_to(url: str, named: str) -> None:
    """Check that a URL can be written, before anything is spent.

    Raises:
        ConfigError: the package for such URLs is missing, or it is that of a web server.
        RemoteError: it cannot be written.
    """
    require_client(url, named, writes=True)
    store = Store(url, named)
    store.write_text(PROBE, "")
    store.remove([PROBE])


def upload_model(directory: Path, url: str, named: str, leave_out: Collection[str] = ()) -> str:
    """Upload the files of a directory; config.json is the last one, so that there is a complete model or none.

    Files of weights that are at the URL under other names are removed.

    Args:
        directory: a complete export.
        url: where `prepare_upload_to` has checked that it can be written.
        named: the beginning of errors.
        leave_out: names of files that are not uploaded.

    Returns:
        the URL.

    Raises:
        RemoteError: the upload has failed several times. The directory is complete.
    """
    files = {one.relative_to(directory).as_posix(): one for one in sorted(directory.rglob("*")) if one.is_file()}
    files = {name: path for name, path in files.items() if name not in leave_out}
    try:
        _upload(Store(url, named), files)
    except RemoteError as problem:
        raise RemoteError(
            f"{problem}; {directory} is complete: try to copy it with the tool of your store"
        ) from problem
    return url


def _upload(store: Store, files: Mapping[str, Path]) -> None:
    there = [one.name for one in store.list()]
    last = [name for name in _LAST if name in files]
    store.remove([name for name in last if name in there])
    store.begin_upload(files, last=last).result()
    store.remove([one for one in there if one not in files and any(fnmatch(one, kind) for kind in WEIGHTS)])
