"""The log of a run's starts, `starts.jsonl` in its output: restarts, their causes, and whether they made progress.

A run that dies in every restart would occupy its machines for ever. So each start under a supervisor is logged, and
`train.max_no_progress_restarts` of them in a row that did not complete one new step end the run. The log is a file
because a requeued job and a restarted group of torchrun share no process with the ones before.

Each line is a JSON object with an `event`. Lines after a start belong to it:

- `start`: time, host, supervisor, and `restart`, the number of the restart; 0 = a start by hand.
- `prepared`: checkpoints of other runs are moved aside, so those in the output are this run's.
- `progress`: `step`, the first step that no earlier start had done.
- `failed`: `rank`, `host`, `cause`; `echo` if the failure only shows that a peer was lost.
- `ended`: the run has reached its end or was asked to stop.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_ds.errors import TrainingError
from megatron_ds.log import get_logger
from megatron_ds.parallel.failure import lost_peer
from megatron_ds.training.supervisor import Supervisor, find_supervisor
from megatron_ds.untrusted import parse_json
from megatron_ds.untrusted.json_text import json_text
from megatron_ds.untrusted.limits import RUN_LINE

START_LOG = "starts.jsonl"
LAST_STEP = ".last_step"
"""File with the last step that was done since the start that was no restart."""
_READ_BYTES = 8 << 20  # from the end; a start on a thousand machines takes 100 KB
_MOST_FAILURES_BYTES = 1 << 16  # of one start, by all its ranks
_LONGEST_CAUSE = 500
_NO_CAUSE = "no message: a rank was killed, hung, or lost its machine"


class NoProgressError(TrainingError):
    """A run is not restarted, because its last restarts made no progress."""


@dataclass
class Start:
    """One start of the run, as logged.

    Attributes:
        supervisor: the program that restarts it.
        restart: the number of the restart; 0 = no restart.
        is_prepared: the checkpoints in the output are the run's own.
        made_progress: it has done a step that no earlier start had done.
        has_ended: it ended as it should.
        causes: (cause, whether it is an echo of another rank's failure) in the order of their records.
    """

    supervisor: Supervisor
    restart: int
    is_prepared: bool = False
    made_progress: bool = False
    has_ended: bool = False
    causes: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def cause(self) -> str:
        """The most likely cause of its failure."""
        ordered = sorted(self.causes, key=lambda cause: cause[1])
        return ordered[0][0] if ordered else _NO_CAUSE


class StartLog:
    """The log of the starts in one output.

    Args:
        output: the run's output directory.
    """

    def __init__(self, output: Path) -> None:
        self._output, self._path = output, output / START_LOG

    @property
    def exists(self) -> bool:
        return self._path.is_file()

    def read(self) -> list[Start]:
        """Return the logged starts, oldest first; damaged lines, as of a full disk, are skipped."""
        starts: list[Start] = []
        for event in self._events():
            if event.get("event") == "start":
                starts.append(_start(event))
            elif starts:
                _add_event(starts[-1], event)
        return starts

    def append(self, event: str, **fields: Any) -> None:
        """Append a line. A disk that is full or gone must not end the run; it is logged."""
        line = json.dumps({"event": event, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields})
        try:
            with open(self._path, "a", encoding="utf-8", opener=_open_without_waiting) as file:
                file.write(line + "\n")
        except OSError as problem:
            get_logger().warning("%s cannot be written (%s)", self._path, problem.strerror or problem)

    def append_start(self, supervisor: Supervisor, restart: int) -> None:
        """Append the start of a run. One that is no restart forgets the last step of earlier runs."""
        if not restart:
            (self._output / LAST_STEP).unlink(missing_ok=True)
        self.append("start", host=socket.gethostname(), restart=restart, supervisor=asdict(supervisor))

    def append_failure(self, problem: BaseException, rank: int | None = None) -> None:
        """Append an exception that ends a rank, or with None as rank the supervisor's own.

        Many ranks may fail at once, so the failures of a start have a limit, and rank 0 alone logs lost peers.
        """
        is_echo = lost_peer(problem)
        with contextlib.suppress(OSError):
            is_full = self._path.stat().st_size > _MOST_FAILURES_BYTES + self._size_at_start()
            if is_full or (is_echo and rank):
                return
        words = " ".join(f"{type(problem).__name__}: {problem}".split())[:_LONGEST_CAUSE]
        self.append("failed", rank=rank, host=socket.gethostname(), cause=words, echo=is_echo)

    def _size_at_start(self) -> int:
        """Return the length of the log up to the last start."""
        content = self._tail()
        return self._path.stat().st_size - len(content) + max(content.rfind(b'{"event": "start"'), 0)

    def _tail(self) -> bytes:
        with open(self._path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _READ_BYTES))
            return file.read()

    def _events(self) -> Iterator[Mapping[str, Any]]:
        for line in self._tail().splitlines() if self.exists else ():
            with contextlib.suppress(TrainingError):  # damaged
                text = json_text(line, START_LOG, TrainingError)
                event = parse_json(text, START_LOG, RUN_LINE, TrainingError)
                if isinstance(event, dict):
                    yield event


@contextmanager
def logging_failure(output: Path, rank: int | None = None) -> Iterator[None]:
    """Log an exception that ends a rank of this start, or all its local ranks, if the start is logged.

    Args:
        output: the run's output directory.
        rank: of this process; None = it is the one that starts local ranks.
    """
    try:
        yield
    except NoProgressError:  # the log has its cause
        raise
    except Exception as problem:
        log_failure(output, rank, problem)
        raise


def log_failure(output: Path, rank: int | None, problem: BaseException) -> None:
    """Log what ends a rank of this start, if the start is logged; see `logging_failure`."""
    log = StartLog(output)
    starts = log.read()
    if starts and find_supervisor().has_started(starts[-1].supervisor):
        log.append_failure(problem, rank)


def check_progress(starts: list[Start], supervisor: Supervisor, limit: int | None) -> None:
    """Refuse a restart after too many that made no progress.

    Args:
        starts: from `StartLog.read`.
        supervisor: of the restart.
        limit: `train.max_no_progress_restarts`.

    Raises:
        NoProgressError: the last `limit` starts were restarts without a new step.
    """
    if limit is None or len(starts) < limit:
        return
    last = starts[-limit:]
    if all(start.restart and not start.made_progress and not start.has_ended for start in last):
        number = "1 restart has" if limit == 1 else f"{limit} restarts in a row have"
        raise NoProgressError(
            f"train.max_no_progress_restarts={limit}: {number} not completed a new step under {supervisor.describe()}; "
            f"cause of the last one: {last[-1].cause}; try a new start by hand once the cause is removed"
        )


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file that may be a pipe, which is refused instead of waited for."""
    return os.open(path, flags | os.O_NONBLOCK, 0o644)


def _start(event: Mapping[str, Any]) -> Start:
    """Return a start from its line; a field of another type, as of a damaged line, counts as absent."""
    found = event.get("supervisor")
    given: Mapping[str, Any] = found if isinstance(found, dict) else {}
    texts = {name: value for name in ("job", "slurm_job") if isinstance(value := given.get(name), str)}
    processes = given.get("processes")
    supervisor = Supervisor(
        **texts,
        requeues=_integer(given.get("requeues")),
        processes=tuple(map(str, processes)) if isinstance(processes, list) else (),
    )
    return Start(supervisor, _integer(event.get("restart")))


def _add_event(start: Start, event: Mapping[str, Any]) -> None:
    kind = event.get("event")
    start.is_prepared |= kind == "prepared"
    start.made_progress |= kind == "progress"
    start.has_ended |= kind == "ended"
    if kind == "failed":
        start.causes.append((str(event.get("cause")), event.get("echo") is True))


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else 0
