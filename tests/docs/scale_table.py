"""The table of plans in docs/scale.md: every figure is the planner's.

`python -m tests.docs.scale_table` writes it anew.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from megatron_ds.config import load_run
from megatron_ds.planner.plan import Plan
from megatron_ds.planner.plan_input import Machines
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.training.planning import RunPlanner

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scale.md"
ROW = re.compile(
    r"^\| `(?P<model>\w+)` \| (?P<gpus>[\d,]+) \| `(?P<overrides>[^`]*)` \|(?P<figures>.*)\|$", re.MULTILINE
)
DEVICE, GPUS_PER_NODE = "h100", 8


class PlannedRow(NamedTuple):
    """A row of the table.

    Attributes:
        model: name of a run file in examples/plan.
        gpus: number of them.
        overrides: of the run file.
        figures: the cells behind.
    """

    model: str
    gpus: int
    overrides: str
    figures: str


def rows_of(text: str) -> list[PlannedRow]:
    """Return the rows of all tables of a page."""
    return [
        PlannedRow(one["model"], int(one["gpus"].replace(",", "")), one["overrides"], one["figures"].strip())
        for one in ROW.finditer(text)
    ]


def plan_of(row: PlannedRow) -> Plan:
    """Plan a row, as `megatron-ds plan` does."""
    run, device = load_run(ROOT / f"examples/plan/{row.model}.yaml", shlex.split(row.overrides)), find_device(DEVICE)
    per_node = min(GPUS_PER_NODE, row.gpus)
    machines = Machines(row.gpus // per_node, per_node, device.type)
    return RunPlanner(run, machines, device, find_network(None, device, per_node)).plan()


def figures_of(plan: Plan) -> str:
    """Return the cells of a plan: seconds, tokens, utilisation, memory, and whether it fits."""
    time, memory = plan.time, plan.fullest.peak_bytes / 1e9
    fits = "" if plan.fits else ", too much"
    return f"{time.total_s:.1f} | {time.tokens_per_s:,.0f} | {100 * time.mfu:.0f} % | {memory:.0f} GB{fits}"


def main() -> None:
    """Write the figures of the page."""

    def planned(one: re.Match[str]) -> str:
        (row,) = rows_of(one[0])
        return f"| `{row.model}` | {row.gpus:,} | `{row.overrides}` | {figures_of(plan_of(row))} |"

    PAGE.write_text(ROW.sub(planned, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
