"""`sessions.jsonl` in a run's output: when and where the run was started and resumed, and how it ended each time.

A line is `{"event": "start", ...}` or `{"event": "end", ...}`. The file grows: a new run in the same output adds to it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_ds.errors import DataError
from megatron_ds.monitor.line_file import LineFile
from megatron_ds.monitor.reporter import RunSummary
from megatron_ds.monitor.summary_text import summary_rows
from megatron_ds.untrusted import read_complete_lines
from megatron_ds.untrusted.limits import RUN_LINE
from megatron_ds.untrusted.records import Record
from megatron_ds.version import __version__

SESSIONS = "sessions.jsonl"
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "triton", "flash-attn")


@dataclass
class Session:
    """One start of a run, and its end.

    Attributes:
        started: its time, as ISO 8601 with the offset of the time zone.
        resumed_after: the step that it continues after; None = it starts the run.
        facts: the start-up summary, as names and texts.
        environment: versions and the machine, by name.
        ended: the time of its end; empty = it is still running, or was killed.
        outcome: its first word is `done`, `stopped` or `failed`.
    """

    started: str
    resumed_after: int | None
    facts: list[tuple[str, str]] = field(default_factory=list)
    environment: Mapping[str, str] = field(default_factory=dict)
    ended: str = ""
    outcome: str = ""


def write_start(output: Path, summary: RunSummary, continue_after: int | None) -> None:
    """Append the start of a session.

    Args:
        output: the run's directory, which exists.
        summary: facts about the run.
        continue_after: the last step before a resumed run; None for a new run.
    """
    facts = {"resumed_after": continue_after, "facts": summary_rows(summary), "environment": environment()}
    _append(output, {"event": "start", "time": _now(), **facts})


def write_end(output: Path, outcome: str) -> None:
    """Append the end of a session, see `Session`; a later end of the same session replaces it."""
    _append(output, {"event": "end", "time": _now(), "outcome": outcome})


def read_sessions(output: Path) -> list[Session]:
    """Return the sessions of the newest run in an output, in their order; none if an earlier version wrote it."""
    path = output / SESSIONS
    events, _ = read_complete_lines(path, _Event, RUN_LINE, DataError) if path.is_file() else ([], 0)
    sessions: list[Session] = []
    for one in events:
        if one.event == "start":
            sessions = sessions if one.resumed_after is not None else []
            sessions.append(Session(one.time, one.resumed_after, one.facts, one.environment))
        elif sessions:
            sessions[-1].ended, sessions[-1].outcome = one.time, one.outcome
    return sessions


class _Event(Record):
    """A line of the file, which may be of a later version with other keys."""

    event: Literal["start", "end"]
    time: str
    resumed_after: int | None = None
    facts: list[tuple[str, str]] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    outcome: str = ""


def environment() -> dict[str, str]:
    """Return versions and facts about this machine."""
    import torch

    found = {"megatron-ds": __version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["CUDA of torch"] = torch.version.cuda
    return {
        **found,
        "system": platform.platform(),
        "host": platform.node(),
        "processors": f"{os.cpu_count()} {platform.machine()}",
        "command": " ".join(sys.argv),
    }


def _append(output: Path, record: Mapping[str, Any]) -> None:
    file = LineFile(output / SESSIONS)
    file.add(json.dumps(record) + "\n")
    file.close()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
