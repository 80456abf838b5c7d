"""The launcher process that started this rank, and the end of ranks whose launcher has died.

A launcher that is killed cannot end its ranks. They would continue to train, hold the lock of the output and occupy the
devices, in the way of those that a new launcher starts. Therefore each rank watches the process that started it:
torchrun's agent, Slurm's slurmstepd or DeepSpeed's launch.py on its own machine.

PR_SET_PDEATHSIG is not used: the kernel sends that signal when the *thread* that forked a process ends, and not at all
if a shell stands between launcher and rank.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.errors import LaunchError
from megatron_ds.log import flush_streams, get_logger
from megatron_ds.parallel.rank_info import LAUNCHERS, RENDEZVOUS_FILE
from megatron_ds.processes import boot_id, read_status

POLL_S = 1.0
_THREAD = "launcher-watch"


@dataclass(frozen=True)
class LauncherProcess:
    """A process that has started ranks.

    Attributes:
        name: of the launcher.
        pid: its process id.
        start_ticks: the time at which it started, in clock ticks since the boot; 0 = unknown. A later process that has
            the same id started later.
    """

    name: str
    pid: int
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        """True until it has ended, even if nothing has read its exit status."""
        if not self.start_ticks:
            return os.getppid() == self.pid
        status = read_status(self.pid)
        return status is not None and status.start_ticks == self.start_ticks and not status.has_ended

    @property
    def identity(self) -> str:
        """A text that no other process has, on any machine."""
        return f"{self.name} {socket.gethostname()} {boot_id()} {self.pid} {self.start_ticks}"


def find_launcher(environ: Mapping[str, str] = os.environ) -> LauncherProcess | None:
    """Return the launcher that started this rank; None without one, or if its variables were set by hand.

    A Slurm step of one task counts as no launcher, as in `rank_from_environment`.

    It is the nearest ancestor whose own environment lacks the variable that it has set for this rank. So a shell or
    another wrapper between both does not count. An ancestor of another user is a launcher: Slurm's runs as root.
    """
    found = next((variable for variable in LAUNCHERS if variable in environ), None)
    if found is None or RENDEZVOUS_FILE in environ:  # `run_local` ends its ranks itself
        return None
    if found == "SLURM_PROCID" and environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None
    pid = os.getppid()
    while pid > 1 and _has(pid, f"{found}={environ[found]}"):
        status = read_status(pid)
        if status is None:
            break
        pid = status.parent
    status = read_status(pid)
    return LauncherProcess(LAUNCHERS[found], pid, status.start_ticks if status is not None else 0)


def end_with_launcher(rank: int | str, environ: Mapping[str, str] = os.environ) -> None:
    """End this process within seconds after its launcher has ended. Returns at once; one thread watches.

    The process ends without saving: its peers may have lost their launchers too, and a run that saved and left with
    status 0 would look as if it had been asked to stop.

    Args:
        rank: of this process, for the message.
        environ: has the launcher's variables.
    """
    launcher = find_launcher(environ)
    if launcher is not None and not any(thread.name == _THREAD for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(rank, launcher), name=_THREAD, daemon=True).start()


def _watch(rank: int | str, launcher: LauncherProcess) -> None:
    while launcher.is_alive:
        time.sleep(POLL_S)
    try:
        problem = LaunchError(f"{launcher.name} (process {launcher.pid}), which started rank {rank}, has ended")
        get_logger().error("error: %s; this rank ends too", problem)
    finally:
        flush_streams()
        os._exit(1)


def _has(pid: int, setting: str) -> bool:
    """Return whether a process began with a setting in its environment; False if that is not readable."""
    try:
        return setting.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
