"""Files of a forked rank: its result, its failure and its stacks.

They are in memory, so that a full temporary directory cannot lose the error of a rank, nor the result of a run that did
all its steps. A fork inherits their descriptors, and each process opens them by its own `/proc/self/fd`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO

FAILURE_FILE = "MEGATRON_DS_FAILURE"
"""Environment variable of ranks that `run_local` started: the file of `write_failure`."""


class RankFiles:
    """The files of one rank; made before it is forked.

    Args:
        folder: the directory of those files that cannot be in memory.
        rank: the rank.

    Attributes:
        result: what the rank returned, pickled; empty until it has ended.
        failure: the file of `write_failure`; empty unless it failed.
        stacks: the stacks of its threads, as faulthandler writes them.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._descriptors: list[int] = []
        self.result, self.failure, self.stacks = (
            self._make(folder, f"{rank}.{name}") for name in ("result", "failure", "stacks")
        )

    def close(self) -> None:
        """Give up the files; closing twice is allowed."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _make(self, folder: Path, name: str) -> Path:
        try:
            descriptor = os.memfd_create(f"megatron_ds.{name}")
        except (AttributeError, OSError):  # not Linux, or no descriptor is left
            path = folder / name
            path.touch()
            return path
        self._descriptors.append(descriptor)
        return Path(f"/proc/self/fd/{descriptor}")


def unnamed_file() -> IO[str]:
    """Return an empty text file without a name: in memory, or where that is not possible in the temporary directory."""
    try:
        return open(os.memfd_create("megatron_ds"), "w+", encoding="utf-8")
    except (AttributeError, OSError):
        return tempfile.TemporaryFile("w+", encoding="utf-8")
