"""Time limits of sections that may take long, such as a save or an export: learned from the earlier ones of their kind.

The limit is one without progress, not one of the whole section: a slow save that writes is no hang. Progress is what a
process reads and writes.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

FIRST_S = 600.0  # of a section without an earlier one of its kind: storage may be slow, kernels may be compiled
SHORTEST_S = 20.0  # storage may be slow once
SLOWER = 10  # a section that takes so many times the slowest before it is a hang
MOVED_BYTES = 2**22  # per unit of work; a status that is published is far smaller
_PROCESS = Path("/proc/self")
_MOVED = re.compile(r"^(?:rchar|wchar|read_bytes): (\d+)$", re.MULTILINE)


class SectionLimits:
    """The time limits of the sections of one rank.

    Args:
        least_s: no limit is below it.
    """

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._slowest_s: dict[str, float] = {}

    def limit_s(self, phase: str) -> float:
        """Return the time limit of a phase, in seconds without progress."""
        slowest_s = self._slowest_s.get(_kind(phase))
        return max(self._least_s, FIRST_S if slowest_s is None else max(SLOWER * slowest_s, SHORTEST_S))

    def reason(self, phase: str) -> str:
        """Return the reason of the limit of a phase, for a message."""
        slowest_s = self._slowest_s.get(_kind(phase))
        return "the first such phase" if slowest_s is None else f"the slowest such phase so far took {slowest_s:.1f} s"

    def took(self, phase: str, seconds: float) -> None:
        """Learn from a section that has ended."""
        kind = _kind(phase)
        self._slowest_s[kind] = max(seconds, self._slowest_s.get(kind, 0.0))


def _kind(phase: str) -> str:
    """Return a phase without its numbers: `saving after step #`."""
    return re.sub(r"\d+", "#", phase)


class MovedBytes:
    """A counter of the bytes that this process and its children have read and written, in units of `MOVED_BYTES`.

    Children are counted because uploads and some trackers run in processes of their own.

    Attributes:
        is_known: False where the system does not count them; then sections have no time limit.
    """

    def __init__(self) -> None:
        self.is_known = os.access(_PROCESS / "io", os.R_OK)
        self._seen: dict[str, int] = {}
        self._rest = 0
        self.take()

    def take(self) -> int:
        """Return the number of units since the last call; a rest is carried over."""
        counts = (
            {pid: count for pid in ("self", *map(str, child_processes())) if (count := _moved_by(pid))}
            if self.is_known
            else {}
        )
        moved = sum(max(0, count - self._seen.get(pid, 0)) for pid, count in counts.items())
        self._seen = counts
        units, self._rest = divmod(self._rest + moved, MOVED_BYTES)
        return units


def child_processes() -> list[int]:
    """Return the ids of this process's children; empty where the system does not list them."""
    found: list[int] = []
    for thread in _PROCESS.glob("task/*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, thread.read_text().split())
    return found


def _moved_by(pid: str) -> int:
    """Return the bytes that a process has moved, those of children that it has waited for included; 0 if it ended."""
    with contextlib.suppress(OSError):
        return sum(map(int, _MOVED.findall((_PROCESS.parent / pid / "io").read_text())))
    return 0
