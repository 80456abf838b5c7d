"""Steps that are recorded on request: a Chrome trace a rank, and a table of where their time went."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from megatron_ds.config import RunConfig
from megatron_ds.errors import TrainingError
from megatron_ds.monitor.profile import PartTimes, table, time_by_part
from megatron_ds.parallel.consensus import gather_objects, run_on_all_ranks
from megatron_ds.parallel.regions import STEP
from megatron_ds.training.watchdog import Heartbeat

FOLDER = "profile"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's profiler says on every rank's standard error, from C++, that it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class StepProfile:
    """Records the steps that `train.profile` names; without it, nothing. Every rank makes one.

    Args:
        run: whose output gets `profile/rank_00000.json` a rank and `profile/parts.json`.
        rank: of this process.
        tell: takes a line; called on every rank.
        beat: is told that writing may take a while.
    """

    def __init__(self, run: RunConfig, rank: int, tell: Callable[[str], None], heartbeat: Heartbeat) -> None:
        self._first, self._last = run.train.profile.steps if run.train.profile is not None else (0, 0)
        self._folder, self._rank = Path(run.output) / FOLDER, rank
        self._tell, self._beat = tell, heartbeat
        self._profiler: Any = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Record what happens inside, if the step is one of those.

        Raises:
            TrainingError: after the last, where the record cannot be written. Collective then.
        """
        if not self._first <= step <= self._last:
            yield
            return
        if self._profiler is None:
            wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & set(supported_activities())
            self._profiler = profile(activities=wanted)
            with _quiet():
                self._profiler.start()
        with record_function(STEP):
            yield
        if step == self._last:
            self._write()

    def _write(self) -> None:
        with _quiet():
            self._profiler.stop()
        self._beat(f"writing the profile of steps {self._first} to {self._last}", may_take_long=True)
        mine = run_on_all_ranks(self._summed)
        everyone = gather_objects(mine)
        run_on_all_ranks(lambda: self._write_table(everyone))
        self._tell(f"profile of steps {self._first} to {self._last}: {self._folder}, a Chrome trace a rank; of a step:")
        for line in table(everyone):
            self._tell(line)
        self._profiler = None

    def _summed(self) -> PartTimes:
        path = self._folder / f"rank_{self._rank:05d}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(path))
            return time_by_part(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as problem:  # a full disk leaves half a trace
            raise TrainingError(f"train.profile: {path} could not be written: {problem}") from None

    def _write_table(self, everyone: list[PartTimes]) -> None:
        if self._rank == 0:
            content = {"steps": [self._first, self._last], "ranks": [asdict(one) for one in everyone]}
            path = self._folder / "parts.json"
            try:
                path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            except OSError as problem:
                raise TrainingError(f"train.profile: {path} could not be written: {problem}") from None
