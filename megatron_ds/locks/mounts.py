"""Mounts whose flock other machines do not see, by their options in /proc/self/mountinfo (proc(5))."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MOUNTS = Path("/proc/self/mountinfo")
_LOCAL_OPTIONS = {
    "lustre": {"localflock"},
    "nfs": {"nolock", "local_lock=flock", "local_lock=all"},
    "nfs4": {"nolock", "local_lock=flock", "local_lock=all"},
}
"""Type of file system -> options with which flock holds on one machine alone: mount.lustre(8), nfs(5)."""


class _Mount(NamedTuple):
    point: str
    kind: str
    options: frozenset[str]


def flock_is_local(directory: Path) -> bool:
    """Return whether the flock of a directory's file system is known to hold on this machine alone."""
    try:
        text = MOUNTS.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system than Linux
        return False
    place = os.path.join(os.path.realpath(directory), "")
    above = [mount for mount in _mounts(text) if place.startswith(os.path.join(mount.point, ""))]
    if not above:
        return False
    longest = max(len(mount.point) for mount in above)
    mount = [one for one in above if len(one.point) == longest][-1]  # the last one hides the others
    return bool(_LOCAL_OPTIONS.get(mount.kind, set()) & mount.options)


def _mounts(text: str) -> Iterator[_Mount]:
    for line in text.splitlines():
        first, _, second = line.partition(" - ")
        own, common = first.split(" "), second.split(" ")
        if len(own) > 5 and len(common) > 2:
            point = own[4].encode().decode("unicode_escape") if "\\" in own[4] else own[4]
            yield _Mount(point, common[0], frozenset([*own[5].split(","), *common[2].split(",")]))
