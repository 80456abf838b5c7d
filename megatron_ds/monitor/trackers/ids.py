"""`trackers.json` in a run's output: its runs in trackers, with which a resumed run continues them.

An entry has the id of the tracker's run, and the last steps that it may have had. They are kept here because
`metrics.jsonl` loses those after the checkpoint each time that the run is resumed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ds.atomic import replacing
from megatron_ds.errors import DataError
from megatron_ds.log import get_logger
from megatron_ds.monitor.metrics import LastSteps
from megatron_ds.monitor.sinks import SinkInfo
from megatron_ds.untrusted import read_record
from megatron_ds.untrusted.limits import RUN_RECORD
from megatron_ds.untrusted.records import Record

FILE = "trackers.json"


def update_entries(info: SinkInfo) -> None:
    """Note which steps the trackers of a resumed run may have had. A new run forgets those of an earlier one."""
    if info.continue_after is None:
        (info.output / FILE).unlink(missing_ok=True)
        return
    entries = _read(info.output)
    if entries:
        _write(info.output, {key: _entry(one["id"], _later(_steps(one), info.written)) for key, one in entries.items()})


def known_id(info: SinkInfo) -> str | None:
    """Return the id of the tracker's run that a resumed run continues; None = it starts a new one there."""
    entry = _read(info.output).get(_key(info))
    return entry["id"] if entry is not None else None


def save_id(info: SinkInfo, run_id: str) -> LastSteps:
    """Keep the id of the tracker's run.

    Returns:
        the last steps that this run of the tracker may have had.
    """
    entries = _read(info.output)
    before = entries.get(_key(info), {})
    last = _steps(before) if before.get("id") == run_id else LastSteps()
    _write(info.output, entries | {_key(info): _entry(run_id, last)})
    return last


def _entry(run_id: str, last: LastSteps) -> dict[str, Any]:
    return {"id": run_id, **last._asdict()}


def _steps(entry: dict[str, Any]) -> LastSteps:
    return LastSteps(int(entry["step"]), int(entry["valid"]))


def _later(one: LastSteps, other: LastSteps) -> LastSteps:
    return LastSteps(*map(max, one, other))


def _read(output: Path) -> dict[str, Any]:
    path = output / FILE
    if not path.is_file():
        return {}
    try:
        found = read_record(path, dict[str, _Entry], RUN_RECORD, DataError)
    except DataError as problem:  # damaged by a crash
        get_logger().warning("%s; trackers start new runs", problem)
        return {}
    return {name: entry.model_dump() for name, entry in found.items()}


class _Entry(Record):
    id: str
    step: int
    valid: int


def _write(output: Path, entries: dict[str, Any]) -> None:
    with replacing(output / FILE) as temporary:
        temporary.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _key(info: SinkInfo) -> str:
    """Return the tracker's name, numbered from the second of that name on."""
    names = [entry.name for entry in info.run.monitor[: info.number + 1]]
    count = names.count(names[-1])
    return names[-1] if count == 1 else f"{names[-1]}_{count}"
