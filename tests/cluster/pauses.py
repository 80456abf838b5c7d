"""Ranks that pause at a place of the code, until the test has cut a cable or stopped a rank there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ds.checkpoint import saver
from megatron_ds.training import worker
from megatron_ds.training.loop import TrainingLoop
from tests.cluster.commands import Job

AT_STEP = 3
_POLL_S = 0.02


def _always(*arguments: Any) -> bool:
    return True


@dataclass(frozen=True)
class Place:
    """A function at whose call a rank pauses.

    Attributes:
        owner: its module or class.
        name: of the function.
        is_meant: called with its arguments; whether to pause at this call.
    """

    owner: Any
    name: str
    is_meant: Callable[..., bool] = _always


PLACES = {
    "start": Place(worker, "_prepare"),
    "build": Place(worker, "build"),
    "step": Place(TrainingLoop, "_step", lambda loop, step: step == AT_STEP),
    "validation": Place(TrainingLoop, "_losses_on"),
    "save": Place(saver, "write_chunks"),
    "export": Place(worker, "export_live"),
}


class Pause:
    """All ranks of a job pause the first time that they come to a place.

    Args:
        place: a key of `PLACES`.
        folder: a new one for its files, seen by all machines.
    """

    def __init__(self, place: str, folder: Path) -> None:
        folder.mkdir()
        self._place, self._folder = PLACES[place], folder

    def install(self, rank: int) -> None:
        """Have this process, which becomes a rank, pause there."""
        owner, name, is_meant = self._place.owner, self._place.name, self._place.is_meant
        original = getattr(owner, name)

        def paused(*arguments: Any, **named: Any) -> Any:
            if is_meant(*arguments):
                (self._folder / f"reached{rank}").touch()
                while not (self._folder / "resumed").exists():
                    time.sleep(_POLL_S)
            return original(*arguments, **named)

        setattr(owner, name, paused)

    def wait(self, job: Job) -> None:
        """Wait until all ranks of the job have come there."""
        job.wait_until(lambda: len(list(self._folder.glob("reached*"))) == len(job.commands))

    def resume(self) -> None:
        (self._folder / "resumed").touch()
