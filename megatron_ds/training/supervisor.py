"""The supervisor of a run: the program that starts the run's ranks again when they have died.

torchrun restarts its workers, Slurm requeues jobs, and `train --max-restarts` starts its local ranks again. A run must
know its supervisor to tell a restart, which continues the run's own work, from a new start of the same command.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_ds.parallel.launcher_process import find_launcher

JOB = "MEGATRON_DS_JOB"
"""Environment variable by which any other supervisor names a run: the same text at each restart."""
_LOCAL = "MEGATRON_DS_SUPERVISOR"
"""Environment variable of the local ranks of a command that restarts them: the identity of the command."""


@dataclass(frozen=True)
class Supervisor:
    """The program, or programs, that restart a run.

    Attributes:
        job: the value of MEGATRON_DS_JOB; empty if it is unset.
        slurm_job: cluster and id of the Slurm job, which a requeued job keeps; empty outside Slurm.
        requeues: how often Slurm has requeued the job.
        processes: identities of the processes that start ranks: one agent of torchrun for each machine, or the command
            with `--max-restarts`. Each starts one group of ranks at a time.
    """

    job: str = ""
    slurm_job: str = ""
    requeues: int = 0
    processes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.job or self.slurm_job or self.processes)

    def restarts(self, last: Supervisor) -> bool:
        """Return whether a start under this supervisor is a restart of the one under `last`.

        A second command in the same Slurm job is not; nor is one under another torchrun.
        """
        is_requeued = self.slurm_job == last.slurm_job != "" and self.requeues > last.requeues
        return is_requeued or self._shares_job_or_process(last)

    def has_started(self, last: Supervisor) -> bool:
        """Return whether `last`, with the processes of all ranks, is the supervisor of this process's own start."""
        is_same_attempt = self.slurm_job == last.slurm_job != "" and self.requeues == last.requeues
        return is_same_attempt or self._shares_job_or_process(last)

    def _shares_job_or_process(self, other: Supervisor) -> bool:
        return self.job == other.job != "" or not set(self.processes).isdisjoint(other.processes)

    def describe(self) -> str:
        """Return its name for messages."""
        if self.processes:
            return self.processes[0].partition(" ")[0]
        return f"Slurm (job {self.slurm_job.rpartition('/')[2]})" if self.slurm_job else f"{JOB}={self.job}"


def find_supervisor(environ: Mapping[str, str] = os.environ) -> Supervisor:
    """Return this rank's supervisor; it is false if nothing restarts the run."""
    slurm_job = environ.get("SLURM_JOB_ID", "")
    requeues = environ.get("SLURM_RESTART_COUNT", "")
    launcher = find_launcher(environ)
    process = launcher.identity if launcher is not None and launcher.name == "torchrun" else environ.get(_LOCAL, "")
    return Supervisor(
        job=environ.get(JOB, ""),
        slurm_job=f"{environ.get('SLURM_CLUSTER_NAME', '')}/{slurm_job}" if slurm_job else "",
        requeues=int(requeues) if requeues.isdecimal() else 0,
        processes=(process,) if process else (),
    )


@contextmanager
def supervising_local_ranks() -> Iterator[None]:
    """Make this process the supervisor of the local ranks that it starts, until the end of the context."""
    os.environ[_LOCAL] = f"--max-restarts {socket.gethostname()} {os.getpid()} {time.time()}"
    try:
        yield
    finally:
        del os.environ[_LOCAL]
