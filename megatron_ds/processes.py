"""Identity of machines and processes: the start of a machine's kernel, and the states of processes in /proc."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class ProcessStatus:
    """The status of a process (proc(5)).

    Attributes:
        state: a letter, such as R, S or Z.
        parent: the id of its parent.
        start_ticks: the time at which it started, in clock ticks since the boot: tells processes of one id apart.
    """

    state: str
    parent: int
    start_ticks: int

    @property
    def has_ended(self) -> bool:
        """True also of a process whose exit status nothing has read."""
        return self.state in "ZX"


def read_status(pid: int) -> ProcessStatus | None:
    """Return the status of a process; None if no process has this id, or on another system than Linux."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may have blanks and parentheses
    return ProcessStatus(state=fields[0], parent=int(fields[1]), start_ticks=int(fields[19]))


def boot_id() -> str:
    """Return an id of this machine since its start, which no other machine has; empty where the system has none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # another system than Linux, or a sandbox
        return ""
