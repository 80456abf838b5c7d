"""Where what is made once on a machine is kept: tokens of texts, compiled kernels."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """`megatron_ds/KIND` under $XDG_CACHE_HOME, or under ~/.cache where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_ds" / kind
