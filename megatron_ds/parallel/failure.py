"""The cause of a job's failure: when one rank dies, its peers lose their connections and fail too."""

from __future__ import annotations

import pickle
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.errors import LaunchError, MegatronDSError

INTERRUPTED = 130  # the exit status of a process that Ctrl-C ended

# Messages of gloo, NCCL and the rendezvous when the other end is gone.
_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket closed|remote process exit|ncclRemoteError"
    r"|timed out waiting",
    re.IGNORECASE,
)
# A rank may abort because a peer is gone, and SIGTERM is how we end ranks: neither shows a cause by itself.
_ECHOES = (signal.SIGABRT, signal.SIGTERM)


class GroupError(LaunchError):
    """A group of ranks ended before its work was done.

    Attributes:
        lost: rank -> the signal that killed it, if this program did not send it.
        is_stopping: the group was asked to stop, so it is not restarted.
    """

    def __init__(self, message: str, lost: Mapping[int, int] | None = None) -> None:
        super().__init__(message)
        self.lost = dict(lost or {})
        self.is_stopping = False


@dataclass(frozen=True)
class Failure:
    """An exception that ended a rank.

    Attributes:
        rank: the rank that ended.
        at_s: the time, in seconds since the epoch.
        error: the exception if the user can fix it, to be raised again as it is; None for any other.
        text: the traceback.
        is_echo: the exception only shows that a peer was lost.
    """

    rank: int
    at_s: float
    error: MegatronDSError | None
    text: str
    is_echo: bool


def lost_peer(problem: BaseException) -> bool:
    """Return whether an exception only shows that another rank is gone."""
    return isinstance(problem, RuntimeError | OSError) and _LOST_PEER.search(str(problem)) is not None


def write_failure(file: Path, rank: int, problem: BaseException) -> None:
    """Record the exception being handled, in the rank that it ends; if that is not possible it is shown on stderr."""
    text = "".join(traceback.format_exception(problem)).rstrip()
    error = problem if isinstance(problem, MegatronDSError) else None
    failure = Failure(rank, time.time(), error, text, lost_peer(problem))
    try:
        content = pickle.dumps(failure)
        pickle.loads(content)
    except Exception:  # the exception cannot be pickled, its text can
        content = pickle.dumps(Failure(rank, failure.at_s, None, text, failure.is_echo))
    try:
        file.write_bytes(content)
    except OSError as problem:  # the cause of the rank's end must not be lost
        sys.stderr.write(f"rank {rank} failed:\n{text}\n({file} cannot be written: {problem.strerror or problem})\n")


def read_failure(file: Path) -> Failure | None:
    """Read the file of `write_failure`; None if it is empty, or cut off by a full disk."""
    try:
        failure = pickle.loads(file.read_bytes())
    except (EOFError, pickle.UnpicklingError):
        return None
    assert isinstance(failure, Failure), type(failure)
    return failure


def find_cause(statuses: Mapping[int, int], failures: Sequence[Failure], left_early: Sequence[int]) -> BaseException:
    """Return the exception that caused a job's failure.

    The first that applies: a Ctrl-C; the user's mistake, as the lowest rank that found it reports it; a rank that was
    killed; the earliest exception that is not an echo of another rank's death; any other failure.

    Args:
        statuses: rank -> exit code, or minus the signal that killed it, of the ranks that failed.
        failures: the failures that ranks recorded.
        left_early: ranks that ended with exit code 0 but never returned.
    """
    if INTERRUPTED in statuses.values():
        return KeyboardInterrupt()
    own = sorted((failure for failure in failures if not failure.is_echo), key=lambda failure: failure.at_s)
    mistakes = [failure for failure in own if failure.error is not None]
    if mistakes:
        error = min(mistakes, key=lambda failure: failure.rank).error
        assert error is not None
        return error
    killed = {rank: -status for rank, status in statuses.items() if status < 0}
    lost = {rank: number for rank, number in killed.items() if number not in _ECHOES}
    parts = [_killed(rank, number) for rank, number in lost.items()]
    parts += [f"rank {failure.rank} failed:\n{failure.text}" for failure in own[:1]]
    if not parts:
        parts = [f"rank {rank} called sys.exit(0) while others continued" for rank in left_early]
        codes = {rank: status for rank, status in statuses.items() if status > 0}
        unexplained = set(codes) - {failure.rank for failure in failures}
        parts += [f"rank {rank} ended with exit code {codes[rank]}" for rank in sorted(unexplained)]
        parts += [_killed(rank, number) for rank, number in killed.items()]
    if not parts:
        parts = [f"rank {f.rank} failed:\n{f.text}" for f in sorted(failures, key=lambda failure: failure.at_s)[:1]]
    return GroupError("; ".join(parts), lost)


def _killed(rank: int, number: int) -> str:
    hint = ", as the kernel does when memory runs out" if number == signal.SIGKILL else ""
    return f"rank {rank} was killed by {signal.Signals(number).name}{hint}"
