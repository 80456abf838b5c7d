"""`python -m bench.combine FILE ...`: one page for several runs, of this machine at several times or of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.report import write
from bench.runs import merge, merge_places, read_json


def main(
    files: Annotated[list[Path], typer.Argument(help="results.json of each run.", exists=True)],
    output: Annotated[Path, typer.Option(help="Output directory.")] = Path("out/bench"),
) -> None:
    """Merge the results of several runs, and write the page, the figures and the chart.

    Example: python -m bench.combine out/bench-1/results.json out/bench-2/results.json --output bench
    """
    found = [read_json(file) for file in files]
    output.mkdir(parents=True, exist_ok=True)
    cases = merge([case for cases, _ in found for case in cases])
    write(cases, merge_places([where for _, where in found]), output)


if __name__ == "__main__":
    typer.run(main)
