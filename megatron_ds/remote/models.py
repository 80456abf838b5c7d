"""Models and checkpoints on a store: which of its files they are, and local copies of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_ds.errors import RemoteError
from megatron_ds.remote.copies import local_files
from megatron_ds.remote.store import RemoteFile, Store
from megatron_ds.remote.urls import require_client

STATE = "training_state/"
MANIFEST = f"{STATE}manifest.json"
_CHECKPOINT = re.compile(rf"(?P<folder>(?:checkpoints/)?step_(?P<step>\d{{8,}})/){re.escape(MANIFEST)}")


def local_model(url: str, named: str, *, with_state: bool) -> str:
    """Return a directory with a copy of a model, or of the newest complete checkpoint of a folder or a run's output.

    Args:
        url: of the directory of a model, a checkpoint, a folder of checkpoints, or a run's output.
        named: the beginning of errors.
        with_state: whether the training state of a checkpoint is copied too.

    Raises:
        ConfigError: the package for such URLs is missing.
        RemoteError: there is no such model, or it cannot be read.
    """
    require_client(url, named)
    found = Store(url, named).list()
    if any(one.name in ("config.json", "adapter_config.json") for one in found):
        folder = ""
    else:
        folder = newest_checkpoint(found) or ""
        if not folder:
            raise RemoteError(f"{named} has no config.json, and no complete checkpoint in it; check the name")
    wanted = [one for one in found if one.name.startswith(folder) and _is_part(one.name[len(folder) :], with_state)]
    if any(one.name.endswith(".safetensors") for one in wanted):
        wanted = [one for one in wanted if not one.name.endswith(".bin")]
    files = [RemoteFile(one.name[len(folder) :], one.size, one.version) for one in wanted]
    return str(local_files(f"{url}/{folder}".rstrip("/"), named, files))


def newest_checkpoint(files: Sequence[RemoteFile]) -> str | None:
    """Return the directory, with a slash at its end, of the newest complete checkpoint among files; None = none is."""
    matches = [match for one in files if (match := _CHECKPOINT.fullmatch(one.name)) is not None]
    return max(matches, key=lambda match: int(match["step"]))["folder"] if matches else None


def _is_part(name: str, with_state: bool) -> bool:
    """Return whether a file belongs to the model itself."""
    return (with_state and name.startswith(STATE)) or "/" not in name
