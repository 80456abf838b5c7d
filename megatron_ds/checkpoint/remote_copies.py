"""Copies of a run's checkpoints at a URL, made while training continues: `checkpoint.copy_to`.

```
s3://bucket/run/
  step_00000200/           as on the disk; complete if it has training_state/manifest.json, which is uploaded last
  latest                   the name of the newest complete one
```

An object store renames nothing, so the manifest takes the place of the directory's name: without it a copy does not
count. Rank 0 alone copies, by a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_ds.checkpoint.directory import COPYING, LATEST, MANIFEST, flush, name_of, step_of
from megatron_ds.errors import RemoteError
from megatron_ds.remote import Store, Transfer, prepare_upload_to

_COMPLETE = re.compile(rf"(step_\d{{8,}})/{re.escape(MANIFEST)}")
_ASIDE = f"{MANIFEST}.aside"


class RemoteCopies:
    """Copies of the checkpoints in a folder. One is uploaded at a time; of those that wait, the newest is next.

    Args:
        url: the directory of the copies.
        folder: of the checkpoints.
        keep: number of complete copies that stay.
        note: called with a line for the log.
    """

    def __init__(self, url: str, folder: Path, keep: int, note: Callable[[str], None]) -> None:
        self._named = f"checkpoint.copy_to={url}"
        self._store, self._folder, self._keep, self._note = Store(url, self._named), folder, keep, note
        self._running: tuple[str, Transfer] | None = None
        self._next: str | None = None
        self._unlinked: tuple[str, OSError] | None = None

    def begin(self, checkpoint: Path) -> None:
        """Begin to copy a complete checkpoint, or have it copied next."""
        self.poll()
        if self._next is not None:
            shutil.rmtree(self._links(self._next), ignore_errors=True)
            self._note(f"{self._named}: {self._next} is not copied, because {checkpoint.name} is complete already")
        self._next = self._unlinked = None
        try:
            self._link(checkpoint)
            self._next = checkpoint.name
        except OSError as problem:  # must not end a run whose checkpoint is complete
            self._unlinked = checkpoint.name, problem
            shutil.rmtree(self._links(checkpoint.name), ignore_errors=True)
            self._note(f"{checkpoint.name} is not copied: {problem}; the next checkpoint is")
        self.poll()

    def poll(self) -> None:
        """Report a copy that is complete or has failed, and begin the next one."""
        if self._running is not None and self._running[1].is_done:
            self._end(raises=False)
        if self._running is None and self._next is not None:
            name, self._next = self._next, None
            links = self._links(name)
            files = {one.relative_to(links).as_posix(): one for one in sorted(links.rglob("*")) if one.is_file()}
            store = Store(f"{self._store.url}/{name}", self._named)
            self._running = name, store.begin_upload(files, last=[MANIFEST])

    def finish(self) -> None:
        """Wait for all copies.

        Raises:
            RemoteError: the last one has failed; the checkpoint itself is complete.
        """
        while self._running is not None:
            self._end(raises=self._next is None and self._unlinked is None)
            self.poll()
        if self._unlinked is not None:
            name, problem = self._unlinked
            raise RemoteError(f"{self._named}: {problem}; {self._folder / name} is complete") from problem

    def _end(self, *, raises: bool) -> None:
        assert self._running is not None
        (name, transfer), self._running = self._running, None
        try:
            num_bytes = transfer.result()
            self._store.write_text(LATEST, f"{name}\n")
            self._note(f"copied {name} to {self._store.url} ({num_bytes / 1e6:,.1f} MB)")
        except RemoteError as problem:
            if raises:
                raise RemoteError(f"{problem}; {self._folder / name} is complete") from problem
            self._note(f"{name} is not copied: {problem}; the next checkpoint is")
        else:
            self._remove_old()
        finally:
            shutil.rmtree(self._links(name), ignore_errors=True)

    def _remove_old(self) -> None:
        try:
            self._remove_all_but_newest()
        except RemoteError as problem:
            self._note(f"older copies stay: {problem}")

    def _remove_all_but_newest(self) -> None:
        files = [one.name for one in self._store.list()]
        for step in complete_steps(files)[self._keep :]:
            own = [name for name in files if name.startswith(f"{name_of(step)}/")]
            self._store.remove(own, first=[f"{name_of(step)}/{MANIFEST}"])

    def _links(self, name: str) -> Path:
        return self._folder / COPYING / name

    def _link(self, checkpoint: Path) -> None:
        """Link the files of a checkpoint, which may be removed before they are copied."""
        links = self._links(checkpoint.name)
        shutil.rmtree(links, ignore_errors=True)
        shutil.copytree(checkpoint, links, copy_function=_hard_link)


def _hard_link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
    return target


def complete_steps(files: list[str]) -> list[int]:
    """Return the steps of the complete copies among names of files, newest first."""
    names = (match[1] for name in files if (match := _COMPLETE.fullmatch(name)))
    return sorted((step_of(Path(name)) for name in names), reverse=True)


def fetch_newest(url: str, folder: Path, after: int) -> int | None:
    """Copy the newest complete checkpoint at a URL into a folder, if it is of a later step than those there.

    Args:
        url: the value of `checkpoint.copy_to`.
        folder: of the checkpoints on the disk.
        after: the step of the newest one there; -1 = the folder has no checkpoint.

    Returns:
        its step; None = there is no later one.

    Raises:
        RemoteError: the URL cannot be read.
    """
    store = Store(url, f"checkpoint.copy_to={url}")
    found = store.list()
    steps = complete_steps([one.name for one in found])
    if not steps or steps[0] <= after:
        return None
    name = name_of(steps[0])
    temporary = folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    own = [one for one in found if one.name.startswith(f"{name}/") and not one.name.endswith(_ASIDE)]
    store.download({one.name: temporary / one.name[len(name) + 1 :] for one in own}, own)
    shutil.rmtree(folder / name, ignore_errors=True)  # without a manifest, or the step would be `after`
    os.replace(temporary, folder / name)
    flush(folder)
    return steps[0]


def check_copies(url: str) -> None:
    """Check that a URL can be written.

    Raises:
        ConfigError, RemoteError: it cannot.
    """
    prepare_upload_to(url, f"checkpoint.copy_to={url}")


def set_copies_aside(url: str, after: int) -> list[str]:
    """Set copies of later steps than `after` aside, as on the disk.

    They belong to a continuation that was abandoned: a later run must not resume from them.

    Returns:
        a line for the log, if there were any.

    Raises:
        RemoteError: the URL cannot be written.
    """
    named = f"checkpoint.copy_to={url}"
    store = Store(url, named)
    later = [step for step in complete_steps([one.name for one in store.list()]) if step > after]
    for step in later:
        manifest = store.read_text(f"{name_of(step)}/{MANIFEST}")
        if manifest is not None:
            store.write_text(f"{name_of(step)}/{_ASIDE}", manifest)
            store.remove([f"{name_of(step)}/{MANIFEST}"])
    if not later:
        return []
    return [f"{named}: {', '.join(map(name_of, later))} set aside: manifest.json is now manifest.json.aside"]
