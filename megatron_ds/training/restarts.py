"""A start of a run under a supervisor: it is logged, continues the run's own checkpoints, and counts its progress."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron_ds.checkpoint.directory import checkpoints_in
from megatron_ds.config import RunConfig
from megatron_ds.errors import TrainingError
from megatron_ds.log import get_logger
from megatron_ds.parallel.consensus import gather_objects, run_on_all_ranks, share_object
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.training.callbacks import Callback, RunState
from megatron_ds.training.resume import checkpoint_folder, lock_output, write_errors
from megatron_ds.training.start_log import LAST_STEP, START_LOG, Start, StartLog, check_progress
from megatron_ds.training.supervisor import Supervisor, find_supervisor
from megatron_ds.untrusted import read_text
from megatron_ds.untrusted.limits import SHORT_TEXT

_STEP_BYTES = 20
_STEP = re.compile(r"[0-9]{1,18}")


class SupervisedStart:
    """This start of a run. Rank 0 writes its log; without a supervisor it logs nothing.

    Args:
        run: the run file.
        rank: of this process.
        supervisor: the program that restarts the run; false without one.
        restart: the number of this restart; 0 = no restart.
        continues: whether the checkpoints in the output are this run's own.
    """

    def __init__(self, run: RunConfig, rank: int, supervisor: Supervisor, restart: int, continues: bool) -> None:
        self._run, self._rank, self._output = run, rank, Path(run.output)
        self._supervisor, self._restart, self._continues = supervisor, restart, continues
        self._log = StartLog(self._output)
        self._is_logged = self._output.is_dir() and (bool(supervisor) or self._log.exists)
        if self._is_logged and rank == 0:  # without a supervisor too: it ends the series of an earlier one's restarts
            self._log.append_start(supervisor, restart)

    def resume(self, run: RunConfig) -> RunConfig:
        """Return the run file of this start: a restart resumes the run's own newest checkpoint, if it has one.

        `checkpoint.resume` as a path, or `never`, is where the run began, not where it continues.
        """
        if not self._continues or run.checkpoint.resume == "auto":
            return run
        return run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"resume": "auto"})})

    def make_output(self, output_lock: object) -> object:
        """Make and lock the output, and log the start there, if a supervisor needs it. Rank 0 only.

        Call it when the run's checks have passed, before anything that may die.

        Args:
            output_lock: the lock of the output; None if it did not exist.

        Returns:
            the lock; None if the output still does not exist.

        Raises:
            CheckpointError: the output cannot be written, or another run has locked it.
        """
        if self._is_logged or not self._supervisor:
            return output_lock
        with write_errors(self._output):
            self._output.mkdir(parents=True, exist_ok=True)
            output_lock = output_lock if output_lock is not None else lock_output(self._run)
        self._log.append_start(self._supervisor, self._restart)
        self._is_logged = True
        return output_lock

    def record(self, event: str) -> None:
        """Log an event of this start."""
        if self._rank == 0 and self._log.exists:
            self._log.append(event)

    def notes(self) -> tuple[str, ...]:
        """Return a line for the run's log if this is a restart."""
        return (f"restart {self._restart} by {self._supervisor.describe()}",) if self._restart else ()

    def callbacks(self) -> list[tuple[str, Callback]]:
        """Return the callback that records the steps done, on all ranks alike; none without a supervisor."""
        recorder = _StepRecorder(self._output, self._log) if self._rank == 0 else Callback()
        return [(START_LOG, recorder)] if self._supervisor else []


def begin_start(run: RunConfig, info: RankInfo) -> SupervisedStart:
    """Find out which supervisor has started the run, and log the start if the output exists. Collective over the world.

    Call it while rank 0 holds the lock of the output.

    Raises:
        NoProgressError: `train.max_no_progress_restarts` is reached.
    """
    supervisor = _gather_supervisor()

    def examine() -> tuple[int, bool]:
        starts = StartLog(Path(run.output)).read() if info.rank == 0 else []
        if not starts or not supervisor.restarts(starts[-1].supervisor):
            return 0, False
        check_progress(starts, supervisor, run.train.max_no_progress_restarts)
        is_own = any(start.is_prepared for start in _same_run(starts))
        return starts[-1].restart + 1, is_own and bool(checkpoints_in(checkpoint_folder(run.output)))

    restart, continues = share_object(run_on_all_ranks(examine))
    return SupervisedStart(run, info.rank, supervisor, restart, continues)


def _gather_supervisor() -> Supervisor:
    """Return rank 0's supervisor with the processes of all ranks. Collective over the world."""
    everyone = gather_objects(find_supervisor())
    processes = dict.fromkeys(process for one in everyone for process in one.processes)
    return replace(everyone[0], processes=tuple(processes))


def _same_run(starts: list[Start]) -> list[Start]:
    """Return the last start that was no restart, and the restarts after it."""
    first = max((place for place, start in enumerate(starts) if not start.restart), default=0)
    return starts[first:]


class _StepRecorder(Callback):
    """Callback of rank 0 that keeps the last step in a file, and logs the first new one.

    The file is written in place, 20 bytes after each step. They stay in the page cache, so a killed process loses
    nothing and a step costs microseconds.
    """

    def __init__(self, output: Path, log: StartLog) -> None:
        self._path, self._log = output / LAST_STEP, log
        self._file: int | None = None
        self._known, self._is_new = 0, False

    def on_run_start(self, state: RunState) -> None:
        text = ""
        with suppress(TrainingError):  # missing or damaged: a start that is no restart has removed it
            text = read_text(self._path, SHORT_TEXT, TrainingError).strip()
        self._known = max(state.step, int(text) if _STEP.fullmatch(text) else 0)
        try:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)
        except OSError as problem:
            get_logger().warning("%s cannot be written (%s)", self._path, problem.strerror)

    def on_step_end(self, state: RunState) -> None:
        if state.step <= self._known:
            return
        if not self._is_new:
            self._is_new = True
            self._log.append("progress", step=state.step)
        if self._file is not None:
            with suppress(OSError):  # a full disk: the log has the first new step, or has warned
                os.pwrite(self._file, f"{state.step}\n".rjust(_STEP_BYTES).encode(), 0)

    def on_run_end(self, state: RunState) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
