"""The page of results in Markdown, and its conclusion for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu.fast.targets import TARGETS
from bench.gpu.targets import MISSED, Judgement, judge

Row = Mapping[str, Any]

TITLES = {"right": "Right: `make gpu-check`", "fast": "Fast: `make gpu-bench`"}
PLAIN = ("section", "name", "ok", "at_s")  # not columns of a table
SHOWN_APART = ("environment", "run", "profile")
MARKS = {True: "ok", False: "**wrong**", None: ""}


def render(halves: Mapping[str, Sequence[Row]], chart: str | None) -> str:
    """Return the page.

    Args:
        halves: the results of "right" and "fast", as far as they exist.
        chart: the file name of the chart; None = without.
    """
    lines = ["# Results on a GPU", ""]
    lines += ["Written by `make gpu-check` and `make gpu-bench`; each replaces its own half of this page.", ""]
    for half, title in TITLES.items():
        lines += [f"## {title}", ""]
        rows = halves.get(half)
        if not rows:
            lines += ["Not run on a GPU yet.", ""]
            continue
        lines += [*_environment(rows), ""]
        if half == "fast":
            lines += [f"![speed of the contestants]({chart})", ""] if chart is not None else []
            lines += [*_targets(judge(rows, TARGETS)), ""]
        lines += [*_failures(rows), ""]
        for section in _sections(rows):
            lines += [f"### {section}", "", *table([row for row in rows if row["section"] == section]), ""]
        lines += _profiles(rows)
    return "\n".join(lines).rstrip() + "\n"


def conclusion(half: str, rows: Sequence[Row]) -> list[str]:
    """Return lines for the end of the command: the targets, or the number of wrong results."""
    wrong = [row for row in rows if row["ok"] is False]
    lines = [""]
    if half == "fast":
        for one in judge(rows, TARGETS):
            lines.append(f"{one.verdict:12} {one.target.measure}: {one.measured or '-'} (target {one.target.text})")
    lines += [f"{row['section']}, {row['name']}: {row.get('error', 'wrong')}" for row in wrong]
    return [*lines, f"{len(rows)} results, {len(wrong)} wrong"]


def _environment(rows: Sequence[Row]) -> list[str]:
    found = next((row for row in rows if row["section"] == "environment"), {})
    return [f"- {name}: {value}" for name, value in found.items() if name not in PLAIN]


def _targets(judged: Sequence[Judgement]) -> list[str]:
    lines = ["| measure | target | measured | |", "| --- | ---: | ---: | --- |"]
    for one in judged:
        verdict = f"**{MISSED}**" if one.verdict == MISSED else one.verdict
        lines.append(f"| {one.target.measure} | {one.target.text} | {one.measured} | {verdict} |")
    return lines


def _failures(rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if row["ok"] is False]
    if not failed:
        return []
    lines = [f"{len(failed)} of {len(rows)} results are wrong or missing:", ""]
    return lines + [f"- {row['section']}, {row['name']}: {row.get('error', _figures(row))}" for row in failed]


def _figures(row: Row) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in row.items() if name not in PLAIN)


def _sections(rows: Sequence[Row]) -> list[str]:
    return [one for one in dict.fromkeys(row["section"] for row in rows) if one not in SHOWN_APART]


def table(rows: Sequence[Row]) -> list[str]:
    """Return results of a section as a table; figures that no row has make no column."""
    rows = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in PLAIN))
    checked = any(row["ok"] is not None for row in rows)
    head = ["", *(["result"] if checked else []), *(name.replace("_", " ") for name in names)]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in rows:
        cells = [row["name"], *([MARKS[row["ok"]]] if checked else []), *(_cell(row.get(name)) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if rows else []


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _profiles(rows: Sequence[Row]) -> list[str]:
    return []
