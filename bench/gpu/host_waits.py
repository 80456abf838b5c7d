"""Places where the host waits for the GPU, by torch's synchronisation debug mode."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

_WAIT = "called a synchronizing"
"""Part of torch's warning; entering the mode warns too."""


def host_waits(act: Callable[[], object]) -> Counter[str]:
    """Run `act` and return the lines of code in which the host waited for the device, with their numbers."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    paths = [(Path(one.filename), one.lineno) for one in caught if _WAIT in str(one.message)]
    return Counter(f"{path.parent.name}/{path.name}:{line}" for path, line in paths)
