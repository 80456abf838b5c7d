"""The page of results in Markdown, and its conclusion for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu.fast.targets import TARGETS
from bench.gpu.judgement import MISSED, Judgement, judge

Row = Mapping[str, Any]

TITLES = {"right": "Right: `make gpu-check`", "fast": "Fast: `make gpu-bench`"}
SMALL = "The shapes are small, to test the command itself: whether a target is met means nothing."
PLAIN = ("section", "name", "ok", "at_s", "losses", "parts", "when")  # not columns of a table
SHOWN_APART = ("environment", "run", "profile")
MARKS = {True: "ok", False: "**wrong**", None: ""}
HEADINGS = {
    "tokens_s": "tokens/s",
    "tflops": "TFLOP/s",
    "of_products": "of the products",
    "mfu": "MFU",
    "of_peak": "of the data sheet's peak",
    "memory_gb_s": "memory GB/s",
    "of_burst": "of a burst's",
    "of_bandwidth": "of its bandwidth",
    "planned_gb": "planned GB",
    "measured_gb": "measured GB",
    "memory_error": "error of memory",
    "planned_ms": "planned ms",
    "measured_ms": "measured ms",
    "time_error": "error of time",
    "reserved_gb": "reserved GB",
    "device_gb": "GB in use on the device",
    "planned_device_gb": "planned of these",
    "launch_us": "launch in µs",
    "all_reduce_gb_s": "all-reduce GB/s",
    "peak_gb": "peak GB",
    "pause_s": "pause in s",
    "written_s": "written in s",
    "gb": "GB",
    "host_gb": "host GB",
}
PERCENT = ("of_products", "mfu", "busy", "of_peak", "of_burst", "of_bandwidth", "memory_error", "time_error")


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
            lines += ["### Targets", "", *_targets(judge((), TARGETS)), ""] if half == "fast" else []
            continue
        lines += [*_environment(rows), ""]
        if half == "fast":
            lines += (
                [f"![speed and memory of the contestants relative to transformers]({chart})", ""]
                if chart is not None
                else []
            )
            lines += ["### Targets", "", *([SMALL, ""] if _is_small(rows) else []), *_targets(judge(rows, TARGETS)), ""]
        lines += _failures(rows)
        for section in _sections(rows):
            lines += [f"### {section}", "", *table([row for row in rows if row["section"] == section]), ""]
        lines += _profiles(rows) if half == "fast" else []
    return "\n".join(lines).rstrip() + "\n"


def conclusion(half: str, rows: Sequence[Row]) -> list[str]:
    """Return lines for the end of the command: the targets, or the number of wrong results."""
    wrong = [row for row in rows if row["ok"] is False]
    lines = [""]
    if half == "fast":
        lines += [SMALL] if _is_small(rows) else []
        for one in judge(rows, TARGETS):
            lines.append(f"{one.verdict:13}{one.measured or '-':>9}  target {one.target.text:9} {one.target.measure}")
    lines += [f"{row['section']}, {row['name']}: {row.get('error', 'wrong')}" for row in wrong]
    return [*lines, f"{len(rows)} results, {len(wrong)} wrong"]


def _is_small(rows: Sequence[Row]) -> bool:
    return any("shapes" in row for row in rows if row["section"] == "environment")


def _environment(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the device, the date and so on, and a line of the versions."""
    found = next((row for row in rows if row["section"] == "environment"), {})
    known = {name: value for name, value in found.items() if name not in PLAIN}
    versions = ", ".join(f"{name} {version}" for name, version in known.pop("versions", {}).items())
    return [f"- {name.replace('_gb', ' in GB')}: {value}" for name, value in known.items()] + [
        f"- versions: {versions}"
    ]


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
    return lines + [f"- {row['section']}, {row['name']}: {row.get('error', _figures(row))}" for row in failed] + [""]


def _figures(row: Row) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in row.items() if name not in PLAIN)


def _sections(rows: Sequence[Row]) -> list[str]:
    return [one for one in dict.fromkeys(row["section"] for row in rows) if one not in SHOWN_APART]


def table(rows: Sequence[Row]) -> list[str]:
    """Return results of a section as a table; figures that no row has make no column."""
    rows = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in PLAIN))
    checked = any(row["ok"] is not None for row in rows)
    head = ["", *(["result"] if checked else []), *(HEADINGS.get(name, name.replace("_", " ")) for name in names)]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in rows:
        cells = [row["name"], *([MARKS[row["ok"]]] if checked else []), *(_cell(row.get(name), name) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if rows else []


def _cell(value: Any, name: str = "") -> str:
    if value is None:
        return ""
    if name in PERCENT:
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _profiles(rows: Sequence[Row]) -> list[str]:
    """Return the profiles of what missed its target; the others are in the JSON."""
    missed = [one.target for one in judge(rows, TARGETS) if one.verdict == MISSED]
    names = dict.fromkeys(figure.profile for target in missed for figure in target.ours)
    found = {row["name"]: row for row in rows if row["section"] == "profile" and "error" not in row}
    lines: list[str] = []
    for name in names:
        if name not in found:
            continue
        row = found[name]
        lines += [f"### Profile: {name}", ""]
        lines += [
            f"The device is busy for {_cell(row['busy'], 'busy')} of the time, with {row['kernels_a_step']:,} kernels"
        ]
        lines += [f"a step; the host waits for it {row['host_waits']} times a step{_places(row['waits'])}.", ""]
        lines += ["| kernel | ms a step | calls a step |", "| --- | ---: | ---: |"]
        lines += [f"| `{kernel.replace('|', '/')}` | {ms} | {calls} |" for kernel, ms, calls in row["kernels"]]
        lines += [""]
    return lines


def _places(waits: Sequence[Sequence[Any]]) -> str:
    return ": " + ", ".join(f"`{place}` {count}" for place, count in waits) if waits else ""
