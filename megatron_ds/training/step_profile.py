"""Profile of selected steps: one Chrome trace per rank, and a table of the time of each part."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, supported_activities

from megatron_ds.config import RunConfig
from megatron_ds.errors import TrainingError
from megatron_ds.log import flush_streams
from megatron_ds.monitor.profile import PartTimes, table, time_by_part
from megatron_ds.parallel.consensus import gather_objects, run_on_all_ranks
from megatron_ds.parallel.regions import STEP
from megatron_ds.parallel.watchdog import Heartbeat

FOLDER = "profile"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence standard error: torch's profiler writes to it from C++, on every rank, when it starts and stops."""
    flush_streams()
    saved_stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved_stderr, 2)
        os.close(saved_stderr)
        os.close(null)


class StepProfile:
    """Recorder of the steps that `train.profile` selects; without it, it does nothing. Every rank makes one.

    Args:
        run: the run file; `profile/rank_00000.json` of each rank and `profile/parts.json` go to its output.
        rank: global rank of this process.
        log_line: called with a line of text, on every rank.
        heartbeat: called before the profile is written, which may take long.
    """

    def __init__(self, run: RunConfig, rank: int, log_line: Callable[[str], None], heartbeat: Heartbeat) -> None:
        self._first, self._last = run.train.profile.steps if run.train.profile is not None else (0, 0)
        self._folder, self._rank = Path(run.output) / FOLDER, rank
        self._log_line, self._heartbeat = log_line, heartbeat
        self._profiler: Any = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Record the body of the context, if the step is selected. Collective over the world after the last of them.

        Raises:
            TrainingError: the profile cannot be written, after the last selected step.
        """
        if not self._first <= step <= self._last:
            yield
            return
        if self._profiler is None:
            activities = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & set(supported_activities())
            self._profiler = profile(activities=activities)
            with _quiet():
                self._profiler.start()
        with record_function(STEP):
            yield
        if step == self._last:
            self._write()

    def _write(self) -> None:
        with _quiet():
            self._profiler.stop()
        self._heartbeat(f"writing the profile of steps {self._first} to {self._last}", may_take_long=True)
        local = run_on_all_ranks(self._write_trace)
        all_ranks = gather_objects(local)
        run_on_all_ranks(lambda: self._write_table(all_ranks))
        self._log_line(
            f"profile of steps {self._first} to {self._last}: {self._folder}, a Chrome trace per rank; times per step:"
        )
        for line in table(all_ranks):
            self._log_line(line)
        self._profiler = None

    def _write_trace(self) -> PartTimes:
        path = self._folder / f"rank_{self._rank:05d}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(path))
            return time_by_part(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as problem:  # a full disk leaves half a trace
            raise TrainingError(f"train.profile: {path} could not be written: {problem}") from None

    def _write_table(self, all_ranks: list[PartTimes]) -> None:
        if self._rank == 0:
            content = {"steps": [self._first, self._last], "ranks": [asdict(one) for one in all_ranks]}
            path = self._folder / "parts.json"
            try:
                path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            except OSError as problem:
                raise TrainingError(f"train.profile: {path} could not be written: {problem}") from None
