"""The per-user cache on a machine, for tokenized text and compiled kernels."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return `megatron_ds/KIND` under $XDG_CACHE_HOME, or under ~/.cache if that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_ds" / kind
