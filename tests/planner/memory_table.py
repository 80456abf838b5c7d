"""A table of planned and measured memory of all cases: `python -m tests.planner.memory_table [PART OF A NAME ...]`."""

from __future__ import annotations

import sys

from tests.planner.memory_cases import MORE, SAMPLE
from tests.planner.memory_runs import compare


def main(parts: list[str]) -> None:
    """Print one row for each case and pipeline stage, as Markdown."""
    print("| run | stage | planned MB | measured MB | error | most is held |\n|---|---|---|---|---|---|")
    for case in (*SAMPLE, *MORE):
        if parts and not any(part in case.name for part in parts):
            continue
        for one in compare(case):
            sizes = f"{one.planned.peak_bytes / 1e6:.2f} | {one.measured_bytes / 1e6:.2f} | {one.error:+.2%}"
            print(f"| {case.name} | {one.planned.stage} | {sizes} | {one.planned.when} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
