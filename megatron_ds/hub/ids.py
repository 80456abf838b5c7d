"""Ids of repositories on the hub, `org/name` or `org/name@revision`, and the difference between them and paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ds.remote import address_of

_NAME = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[\w][\w./-]*))?")
_SNAPSHOT = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)")
_LONGEST_REPO = 96


@dataclass(frozen=True)
class HubId:
    """A repository on the hub.

    Attributes:
        repo: `org/name`.
        revision: a branch, a tag or a commit; None = the main branch.
    """

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def download_command(self) -> str:
        """The command that downloads all its files to the cache."""
        return f"hf download {self.repo}" + (f" --revision {self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Snapshot:
    """The directory in the client's cache that holds the files of one commit, as far as they were downloaded.

    Attributes:
        id: the repository, with the commit as its revision.
        directory: the directory.
    """

    id: HubId
    directory: Path

    @property
    def cache(self) -> Path:
        """The client's cache."""
        return self.directory.parents[2]

    @property
    def commit(self) -> str:
        """The commit."""
        return self.directory.name


def parse_id(text: str) -> HubId | None:
    """Return the id that a text is, by its form alone; None = it has another form."""
    match = _ID.fullmatch(text)
    if match is None or len(match["repo"]) > _LONGEST_REPO or "--" in match["repo"] or ".." in text:
        return None
    return HubId(match["repo"], match["revision"])


def hub_id(text: str) -> HubId | None:
    """Return the id that a text is; None = it has another form, or there is something of that name on this machine."""
    return None if os.path.lexists(text) else parse_id(text)


def snapshot_of(directory: Path) -> Snapshot | None:
    """Return the snapshot that a directory in the client's cache is; None = it is another directory."""
    match = _SNAPSHOT.fullmatch(directory.parent.parent.name) if directory.parent.name == "snapshots" else None
    if match is None:
        return None
    return Snapshot(HubId(f"{match['org']}/{match['name']}", directory.name), directory)


def name_of(path: str) -> str:
    """Return the id with its commit if a path is the directory of a snapshot, the URL of a copy, or else the path."""
    found = snapshot_of(Path(path))
    return address_of(path) if found is None else str(found.id)
