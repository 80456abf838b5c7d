"""Write `bench/RESULTS-GPU.md`, `results-gpu.json` and `results-gpu.png` from the results of a command.

The page has two halves, "right" and "fast"; a command replaces its own.
`python -m bench.gpu.report HALF FILE ...` writes them again from files of results, of which the later ones replace
results of the earlier ones: so runs of single parts make a half. Without arguments, the page and the chart are drawn
again from the JSON.

They are written to the directory of the results, and to `bench/` if a complete command ran on a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import page
from bench.gpu.chart import draw

BENCH = Path(__file__).resolve().parents[1]
JSON, PAGE, CHART = "results-gpu.json", "RESULTS-GPU.md", "results-gpu.png"

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the results of a file of JSON lines; a last line that is cut off is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def joined(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the last result of each name in several runs; what a limit cut off in one of them is left out."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        for row in read_rows(file):
            if row["section"] != "run":
                found.pop((row["section"], row["name"]), None)
                found[row["section"], row["name"]] = row
    return sorted(found.values(), key=lambda row: row["section"] != "environment")


def is_of_a_gpu(rows: Sequence[Row]) -> bool:
    """Return whether the results are of the full shapes on a GPU."""
    found = next((row for row in rows if row["section"] == "environment"), {})
    return found.get("driver", "none") != "none" and "shapes" not in found


def write_half(half: str, rows: Sequence[Row], folder: Path) -> None:
    """Replace one half of the results in a folder, and write its page and chart."""
    halves = read_halves(folder)
    halves[half] = list(rows)
    (folder / JSON).write_text(json.dumps(halves, indent=1) + "\n")
    write_page(halves, folder)


def read_halves(folder: Path) -> dict[str, list[Row]]:
    """Return the results of both halves, as far as they were written."""
    file = folder / JSON
    return json.loads(file.read_text()) if file.is_file() else {}


def write_page(halves: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Write the page, and the chart if matplotlib is installed."""
    drawn = draw(halves.get("fast", ()), folder / CHART)
    (folder / PAGE).write_text(page.render(halves, CHART if drawn else None))


def main(arguments: Sequence[str]) -> int:
    """Write the report; returns 1 if a result is wrong. "partial" results do not replace the committed ones."""
    if not arguments:
        write_page(read_halves(BENCH), BENCH)
        return 0
    half, complete = arguments[0], "partial" not in arguments[2:]
    files = [Path(one) for one in arguments[1:] if one != "partial"]
    file, rows = files[-1], read_rows(files[0]) if len(files) == 1 else joined(files)
    folders = [file.parent] if os.access(file.parent, os.W_OK) else []
    folders += [BENCH] if complete and is_of_a_gpu(rows) else []
    for folder in folders:
        write_half(half, rows, folder)
    written = [f"{folder / PAGE}, {JSON}, {CHART}" for folder in folders[-1:]]
    sys.stdout.write("\n".join([*page.conclusion(half, rows), *written, ""]))
    return int(any(row["ok"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
