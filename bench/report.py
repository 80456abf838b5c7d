"""Reports of the results: tables on the terminal and in Markdown, and a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.bars import draw_bars, save_chart, two_panels
from bench.result import CaseResult, EntryResult, write_json


def columns(result: CaseResult) -> list[str]:
    names = ["", "ranks", result.unit, "slowest to fastest", "relative to the first", "peak GB per process"]
    names += [f"of {name}" for name in result.limit_flops] if result.flops else []
    return [*names, "alone", "slowest to fastest"] if result.has_alone else names


def row(result: CaseResult, entry: EntryResult) -> list[str]:
    """Format the table cells of a contestant, one for each of `columns`."""
    speed, first = result.speed(entry), result.speed(result.entries[0])
    cells = [
        entry.label,
        str(entry.world),
        *_speeds(result, entry.seconds),
        f"{speed / first:.2f}",
        f"{entry.peak_bytes / 1e9:.2f}",
    ]
    if result.flops:
        cells += [f"{fraction:.0%}" for fraction in result.fractions_of_limits(entry)]
    return cells + (_speeds(result, entry.alone_seconds) if result.has_alone else [])


def _speeds(result: CaseResult, seconds: Sequence[float]) -> list[str]:
    """Format the median speed and its range; nothing if it was not measured."""
    if not seconds:
        return ["", ""]
    speed, low, high = result.speeds(seconds)
    digits = 0 if speed >= 100 else 2
    return [f"{speed:,.{digits}f}", f"{low:,.{digits}f} to {high:,.{digits}f}"]


def show(result: CaseResult, console: Console) -> None:
    """Print the table of a case on the terminal."""
    table = Table(title=f"{result.name}: {result.title}", title_justify="left", title_style="bold")
    for name in columns(result):
        table.add_column(name, justify="left" if not name else "right")
    for entry in result.entries:
        table.add_row(*row(result, entry), style="bold" if entry.label.startswith("ours") else None)
    console.print(table)
    if result.note:
        console.print(f"  {result.note}", style="dim")
    for target in result.targets:
        console.print(f"  {target.summary}", style="green" if target.met else "red")
    console.print()


def write(results: Sequence[CaseResult], where: dict[str, str], output: Path) -> None:
    """Write `results.json`, `RESULTS.md` and `results.png` to a directory."""
    write_json(list(results), where, output / "results.json")
    draw(results, output / "results.png")
    (output / "RESULTS.md").write_text(markdown(results, where, "results.png"))


ABOUT = """\
Written by `make bench`. The contestants of a case take turns within a run, with the same weights and batch. Those of a
target are measured a second time, each alone on the machine, because a contestant that waits for its turn still holds
memory. Speeds are medians over the rounds of all runs. In turns, the ratio of a run is the median of the ratios within
its rounds; alone, the ratio of the medians. A target is met if the median over runs is, in the worse of both ways.
Memory is the peak of the largest process (resident on CPU, allocated on a GPU), including libraries. The limit is the
speed of plain matrix products in the same run; recomputation does not count as work."""


def markdown(results: Sequence[CaseResult], where: dict[str, str], chart: str | None) -> str:
    """Format the targets and the tables of all cases as a Markdown page."""
    lines = ["# Benchmark results", ""]
    lines += [f"- {name}: {value}" for name, value in where.items()]
    lines += ["", ABOUT, ""]
    if chart is not None:
        lines += [f"![speed and memory relative to the first contestant of each case]({chart})", ""]
    targets = [[result.name, *judged.cells()] for result in results for judged in result.targets]
    if targets:
        lines += ["## Targets", "", *_table(["case", "ratio", "target", "in turns", "alone", ""], targets, 3), ""]
    for result in results:
        rows = [row(result, entry) for entry in result.entries]
        lines += [f"## {result.name}: {result.title}", "", *_table(columns(result), rows, 1), ""]
        lines += [result.note, ""] if result.note else []
    return "\n".join(lines).rstrip() + "\n"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return the lines of a Markdown table whose first columns are aligned to the left."""
    alignment = ["---" if index < left else "---:" for index in range(len(names))]
    return [f"| {' | '.join(cells)} |" for cells in (names, alignment, *rows)]


def draw(results: Sequence[CaseResult], path: Path) -> None:
    """Plot the speed of each contestant relative to the first of its case, and its memory if a model is trained."""
    bars = [(result, entry) for result in results for entry in result.entries[1:]]
    labels = [entry.label for _, entry in bars]
    speeds = [result.speed(entry) / result.speed(result.entries[0]) for result, entry in bars]
    peaks = [entry.peak_bytes / (result.entries[0].peak_bytes if result.flops else math.nan) for result, entry in bars]
    figure, axes = two_panels(len(bars), width_inches=11)
    draw_bars(axes[0], labels, speeds, "speed relative to the first of the case (higher is better)")
    draw_bars(axes[1], labels, peaks, "peak memory per process, relative to the first (lower is better)")
    axes[0].set_yticks(range(len(bars)), [f"{result.name}: {entry.label}" for result, entry in bars], fontsize=8)
    save_chart(figure, path)
