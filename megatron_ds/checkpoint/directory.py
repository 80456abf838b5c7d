"""The directory of a run's checkpoints: names, the newest one, removal of old ones.

```
checkpoints/
  step_00000200/           a checkpoint; it has this name only once it is complete
    config.json, model*.safetensors, tokenizer ...      read by transformers
    training_state/
      manifest.json        length and checksum of every file
      progress.json        see `progress`
      state-*.safetensors  fp32 masters and moments, as slices of full tensors
  latest                   the name of the newest checkpoint
  .step_00000400.tmp/      being written, or left over from a crash
```

Names appear and disappear by renaming alone, which a crash cannot leave half done.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import xxhash

from megatron_ds.atomic import replacing
from megatron_ds.checkpoint.files import FileRecord, flush, write_bytes
from megatron_ds.errors import CheckpointError
from megatron_ds.hf.export_target import TRAINING_STATE
from megatron_ds.locks import FileLock, LockHeldError
from megatron_ds.log import flush_streams, get_logger
from megatron_ds.untrusted import file_inside, is_missing, read_record, read_text
from megatron_ds.untrusted.limits import CHECKPOINT_RECORD, SHORT_TEXT
from megatron_ds.untrusted.names import is_inside_name
from megatron_ds.untrusted.records import Record

STATE = TRAINING_STATE
MANIFEST = f"{STATE}/manifest.json"
PROGRESS = f"{STATE}/progress.json"
LATEST = "latest"
_STEP = re.compile(r"step_(\d{8,})")
_LONGEST_NAME = 200
COPYING = ".copying"
"""The directory with links to the files of checkpoints that are being copied elsewhere."""
_LEFTOVER = re.compile(rf"\.step_\d{{8,}}\.(tmp|old)|{re.escape(COPYING)}")


def name_of(step: int) -> str:
    """Return the name of the directory of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint by the name of its directory; -1 if it is not such a name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def is_checkpoint(path: Path) -> bool:
    """Return whether a directory is a checkpoint that was once complete."""
    return (path / MANIFEST).is_file()


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, damaged ones included."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that a path means: itself, or the latest in a folder of checkpoints or a run's output.

    Any other path is returned unchanged.
    """
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            named = folder / newest_name(folder)
            newest = next((one for one in checkpoints_in(folder) if is_checkpoint(one)), named)
            return named if step_of(named) >= 0 and is_checkpoint(named) else newest
    return path


def newest_name(folder: Path) -> str:
    """Return the name in `latest`; empty if it is damaged, because names alone decide then."""
    try:
        name = read_text(folder / LATEST, SHORT_TEXT, CheckpointError).strip()
    except CheckpointError:
        return ""
    return name if is_inside_name(name) else ""


def temporary_for(folder: Path, step: int) -> Path:
    """Return the directory under which a checkpoint is written until it is complete."""
    return folder / f".{name_of(step)}.tmp"


def write_manifest(directory: Path, records: dict[str, FileRecord]) -> None:
    """Write the manifest, the last file of a checkpoint."""
    files = {name: asdict(records[name]) for name in sorted(records)}
    content = {"files": files, "files_xxh3_128": _digest(records)}
    write_bytes(directory / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())


def _digest(records: Mapping[str, FileRecord]) -> str:
    """Return the checksum of a manifest's own content; earlier versions wrote none."""
    lines = (f"{name}\n{records[name].bytes}\n{records[name].xxh3_128}\n" for name in sorted(records))
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """Read the lengths and checksums of the files that a checkpoint must have.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    path = directory / MANIFEST
    try:
        manifest = read_record(path, _Manifest, CHECKPOINT_RECORD, CheckpointError)
        files = manifest.files
        if PROGRESS not in files:
            raise CheckpointError(f"{path}: it does not list {PROGRESS}")
        if manifest.files_xxh3_128 not in (None, _digest(files)):
            raise CheckpointError(f"{path}: files_xxh3_128 is not the checksum of its files")
        for name in files:
            file_inside(directory, name, name, CheckpointError)
    except CheckpointError as problem:
        if is_missing(problem):
            raise
        raise CheckpointError(f"{path} is damaged ({str(problem).removeprefix(f'{path}: ')})") from problem
    return files


class _Manifest(Record):
    files: dict[str, FileRecord]
    files_xxh3_128: str | None = None


def put_in_place(folder: Path, step: int) -> Path:
    """Give a complete checkpoint its name and let `latest` point to it.

    Raises:
        OSError: there is a checkpoint of that step, which the run that it belongs to would have moved aside.
    """
    new, final = temporary_for(folder, step), folder / name_of(step)
    for directory in sorted((path for path in new.rglob("*") if path.is_dir()), reverse=True):
        flush(directory)
    flush(new)
    os.replace(new, final)
    flush(folder)
    point_to(folder, final.name)
    return final


def point_to(folder: Path, name: str | None) -> None:
    """Let `latest` name a checkpoint; None = remove `latest`."""
    if name is None:
        (folder / LATEST).unlink(missing_ok=True)
        return
    content = f"{name}\n".encode()
    if (folder / LATEST).is_file() and (folder / LATEST).read_bytes() == content:
        return  # a full disk has no room to write it again
    with replacing(folder / LATEST) as temporary:
        write_bytes(temporary, content)
    flush(folder)


def remove_old(folder: Path, keep: int, protected: Collection[Path]) -> None:
    """Remove all but the `keep` newest checkpoints and the protected ones."""
    safe = {path.resolve() for path in protected}
    gone = [path for path in checkpoints_in(folder)[keep:] if path.resolve() not in safe]
    for path in gone:
        leftover = folder / f".{path.name}.old"
        shutil.rmtree(leftover, ignore_errors=True)
        os.replace(path, leftover)  # never incomplete under its own name
        shutil.rmtree(leftover)


def lock(folder: Path) -> FileLock:
    """Keep other runs from writing to a directory as long as the returned lock exists.

    Where the file system has no flock, a run that was suspended for a minute may lose the lock; its process then ends.

    Raises:
        CheckpointError: another run holds the lock.
    """

    def end(owner: str) -> None:
        get_logger().error(
            "error: %s is being written by another run (%s), which has taken it over because this one gave no sign of "
            "life; this run ends",
            folder,
            owner,
        )
        flush_streams()
        os._exit(1)

    held = FileLock(folder / ".lock", on_lost=end)
    try:
        held.acquire(blocking=False)
    except LockHeldError as problem:
        who = f" ({problem.owner})" if problem.owner else ""
        raise CheckpointError(
            f"{folder} is being written by another run{who}; wait for its end, or choose another output"
        ) from None
    return held


def remove_leftovers(folder: Path) -> None:
    """Remove the leftovers of checkpoints whose writing, copying or removal a crash interrupted."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path, after: int) -> Path | None:
    """Move checkpoints of later steps than `after` aside, to `checkpoints.1`, `checkpoints.2`, ...

    They are damaged, or belong to another run or to a continuation that was abandoned.

    Returns:
        The folder that they are in now; None if there were none.
    """
    later = [path for path in checkpoints_in(folder) if step_of(path) > after]
    if not later:
        return None
    number, real = 1, folder.resolve()  # the folder may be a link to another disk
    while (target := real.with_name(f"{real.name}.{number}")).exists():
        number += 1
    target.mkdir()
    for path in later:
        os.replace(path, target / path.name)
    return target
