"""Proof that a directory is the same on all machines: rank 0 writes a fresh token there, and every rank reads it back.

A directory that merely exists everywhere proves nothing: machines may have one each, with what earlier runs left there.
A network disk may show a new file late, so ranks look for it for `SEEN_WITHIN_S`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ds.parallel.agreement import Council, name_places

SEEN_WITHIN_S = 10.0  # a network disk shows a new file within this time
FIRST_POLL_S, MAX_POLL_S = 0.01, 0.5
LEFT_OVER_S = 3600.0  # a token of this age was left by a run that was killed
_PREFIX = ".megatron_ds-shared-"


def check_shared(council: Council, directories: Mapping[str, str]) -> None:
    """Check that every rank sees the same directories. Collective over the world.

    A directory that does not exist yet is checked in the nearest one above it, and is not made.

    Args:
        council: the ranks.
        directories: key of the run file -> directory; rank 0's choice, the others' is ignored.

    Raises:
        ConfigError: a directory is not the same everywhere, or rank 0 cannot write there; see `Council.decide`.
    """
    token = uuid.uuid4().hex
    placed: dict[str, tuple[str, int]] = {}  # key -> the directory, and the levels from it up to the token
    problem = ""
    files: list[Path] = []
    if council.info.rank == 0:
        for key, directory in directories.items():
            level, place = _nearest(Path(directory))
            if not place.is_dir():
                continue  # it is refused later on, with the reason
            try:
                files.append(_write(place, token))
            except OSError as error:
                reason = error.strerror or error
                problem = f"{key}={directory} cannot be written ({place}: {reason}); choose another place"
            placed[key] = (directory, level)
    try:
        token, problem, placed = json.loads(council.from_first("token", json.dumps([token, problem, placed])))
        unseen = [] if problem else [key for key, (path, level) in placed.items() if not _sees(path, level, token)]
        own = json.dumps({"host": socket.gethostname(), "unseen": unseen, "problem": problem})
        council.decide("the disks that they share", own, lambda texts: _judge(texts, placed))
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def wait_for_text(file: Path, text: str) -> bool:
    """Return whether a file with this content can be read within `SEEN_WITHIN_S`."""
    until, pause_s = time.monotonic() + SEEN_WITHIN_S, FIRST_POLL_S
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if file.read_text(encoding="utf-8") == text:
                return True
        if time.monotonic() >= until:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, MAX_POLL_S)
        _ask_server(file.parent)


def _judge(texts: Sequence[str], placed: Mapping[str, tuple[str, int]]) -> str:
    everyone = [json.loads(text) for text in texts]
    if everyone[0]["problem"]:
        return str(everyone[0]["problem"])
    hosts = [one["host"] for one in everyone]
    for key, (directory, _) in placed.items():
        blind = [rank for rank, one in enumerate(everyone) if key in one["unseen"]]
        if blind:
            return (
                f"{key}={directory} is not one directory that all ranks share: what {name_places([0], hosts)} writes "
                f"there is not seen by {name_places(blind, hosts)}; choose a place on a disk that all machines share"
            )
    return ""


def _write(place: Path, token: str) -> Path:
    for old in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > LEFT_OVER_S:
                old.unlink()
    file = place / f"{_PREFIX}{token}"
    file.write_text(token, encoding="utf-8")
    return file


def _nearest(path: Path) -> tuple[int, Path]:
    """Return the nearest of a path and its parents that exists, and its number of levels above the path."""
    return next(
        (level, place) for level, place in enumerate((path.absolute(), *path.absolute().parents)) if place.exists()
    )


def _sees(path: str, level: int, token: str) -> bool:
    """Return whether this rank sees the token, and nothing below it that rank 0 does not see."""
    own = Path(path).absolute()
    place = [own, *own.parents][level]
    if not wait_for_text(place / f"{_PREFIX}{token}", token):
        return False
    until = time.monotonic() + SEEN_WITHIN_S
    while _nearest(own)[0] < level:  # a mount of this machine's own, or a directory that was removed a moment ago
        if time.monotonic() > until:
            return False
        _ask_server(_nearest(own)[1])
        time.sleep(MAX_POLL_S)
    return True


def _ask_server(directory: Path) -> None:
    """Open a directory: NFS then asks the server for it, instead of believing its own cache for up to a minute."""
    with contextlib.suppress(OSError):
        os.close(os.open(directory, os.O_RDONLY))
