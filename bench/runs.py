"""Several runs of the bench as one: their rounds, their ratios, and where they were made."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cases import Target
from bench.result import CaseResult, EntryResult, TargetResult

COUNTED = ("runs",)  # facts of a run that are added up; of others, the different values are listed


def merge(results: Sequence[CaseResult]) -> list[CaseResult]:
    """Return one result for each case, in the order of their first runs."""
    by_name: dict[str, list[CaseResult]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    return [_of_runs(runs) for runs in by_name.values()]


def _of_runs(runs: Sequence[CaseResult]) -> CaseResult:
    entries: dict[str, list[EntryResult]] = {}
    targets: dict[Target, list[TargetResult]] = {}
    for run in runs:
        for entry in run.entries:
            entries.setdefault(entry.label, []).append(entry)
        for judged in run.targets:
            targets.setdefault(judged.target, []).append(judged)
    limits = {name: statistics.median(run.limit_flops[name] for run in runs) for name in runs[0].limit_flops}
    return replace(
        runs[0],
        limit_flops=limits,
        entries=tuple(_entry_of_runs(found) for found in entries.values()),
        targets=tuple(
            TargetResult(
                target,
                tuple(ratio for one in found for ratio in one.in_turns),
                tuple(ratio for one in found for ratio in one.alone),
            )
            for target, found in targets.items()
        ),
    )


def _entry_of_runs(found: Sequence[EntryResult]) -> EntryResult:
    return replace(
        found[0],
        seconds=tuple(second for one in found for second in one.seconds),
        alone_seconds=tuple(second for one in found for second in one.alone_seconds),
        peak_bytes=max(one.peak_bytes for one in found),
    )


def merge_places(places: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the facts of several runs: the number of runs, and the different values of all others."""
    names = dict.fromkeys(name for place in places for name in place)
    values = {name: list(dict.fromkeys(place[name] for place in places if name in place)) for name in names}
    counts = {name: str(sum(int(place.get(name, "1")) for place in places)) for name in COUNTED}
    return {**{name: "; ".join(found) for name, found in values.items()}, **counts}


def read_json(path: Path) -> tuple[list[CaseResult], dict[str, str]]:
    """Read the results that `result.write_json` wrote, and the facts of their runs."""
    found = json.loads(path.read_text())
    return [_case(one) for one in found.pop("cases")], found


def _case(fields: dict[str, Any]) -> CaseResult:
    entries = tuple(
        EntryResult(**{**one, "seconds": tuple(one["seconds"]), "alone_seconds": tuple(one["alone_seconds"])})
        for one in fields["entries"]
    )
    targets = tuple(
        TargetResult(Target(**one["target"]), tuple(one["in_turns"]), tuple(one["alone"])) for one in fields["targets"]
    )
    return CaseResult(**{**fields, "entries": entries, "targets": targets})
