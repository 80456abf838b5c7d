"""Options of `megatron-ds plan` about failures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ds.errors import ConfigError, show
from megatron_ds.paths import expanded

if TYPE_CHECKING:
    from megatron_ds.planner.failures.closed_forms import Faults, Saving
    from megatron_ds.planner.failures.fault_plan import FaultPlan
    from megatron_ds.planner.pipeline.stragglers import RandomSlowness

PANEL = "Failures"
MtbfHours = Annotated[
    float | None,
    typer.Option(
        metavar="H",
        rich_help_panel=PANEL,
        help="Mean hours between failures of one node (default: 6,335, those of Llama 3's).",
    ),
]
SaveSeconds = Annotated[
    str | None,
    typer.Option(
        metavar="P[,W]",
        rich_help_panel=PANEL,
        help="Seconds that a checkpoint pauses training, and from there until it is written; a run logs both "
        "(default: estimated).",
    ),
]
RestartSeconds = Annotated[
    float, typer.Option(metavar="S", min=0, rich_help_panel=PANEL, help="Seconds of a restart after a failure.")
]
SpareNodes = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, rich_help_panel=PANEL, help="Nodes that replace broken ones (default: enough)."),
]
Stragglers = Annotated[
    str | None,
    typer.Option(
        metavar="D[,P]",
        rich_help_panel=PANEL,
        help="Slow devices: percent by which devices differ, and each device's passes (standard deviations).",
    ),
]
GoodputPlot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png", parser=expanded, rich_help_panel=PANEL, help="Draw goodput over the checkpoints' interval."
    ),
]


def faults_of(nodes: int, mtbf_hours: float | None, restart_seconds: float, spare_nodes: int | None) -> Faults:
    """Return rates and costs of failures.

    Raises:
        ConfigError: an option is out of range.
    """
    from megatron_ds.planner.failures.closed_forms import LLAMA3_NODE_MTBF_HOURS, Faults

    if mtbf_hours is not None and not 0 < mtbf_hours < math.inf:
        raise ConfigError(f"--mtbf-hours={mtbf_hours:g} must be above 0; try 6335, the hours of Llama 3's nodes")
    return Faults(
        nodes,
        node_mtbf_hours=LLAMA3_NODE_MTBF_HOURS if mtbf_hours is None else mtbf_hours,
        restart_s=restart_seconds,
        spare_nodes=spare_nodes,
    )


def parse_saving(text: str) -> Saving:
    """Return the cost of a checkpoint from `PAUSE` or `PAUSE,WRITE` seconds.

    Raises:
        ConfigError: it is not one or two numbers.
    """
    from megatron_ds.planner.failures.closed_forms import Saving

    seconds = _numbers(text)
    if not 1 <= len(seconds) <= 2:
        raise ConfigError(
            f"--save-seconds={show(text)} is not the seconds of a pause, or of a pause and of writing; try 2 or 2,60"
        )
    return Saving(*seconds)


def parse_stragglers(text: str) -> RandomSlowness:
    """Return random slowness from the percent of `DEVICES` or `DEVICES,PASSES`.

    Raises:
        ConfigError: it is not one or two numbers.
    """
    from megatron_ds.planner.pipeline.stragglers import RandomSlowness

    percents = _numbers(text)
    if not 1 <= len(percents) <= 2 or max(percents) > 100:
        raise ConfigError(
            f"--stragglers={show(text)} is not the percent of devices, or of devices and of passes; try 1 or 1,5"
        )
    variances = [(percent / 100) ** 2 for percent in percents] + [0.0]
    return RandomSlowness(variances[0], variances[1])


def _numbers(text: str) -> list[float]:
    """Return numbers of at least 0, separated by commas; none if one is wrong."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        return []
    return found if all(0 <= one < math.inf for one in found) else []


def draw_failures(plan: FaultPlan, gpus_per_node: int, path: Path) -> None:
    """Draw goodput over the interval for a planned run."""
    from megatron_ds.planner.failures.goodput_plot import draw_goodput

    name = f"{plan.faults.nodes * gpus_per_node:,} devices"
    sizes: Mapping[str, Faults] = {name: plan.faults}
    draw_goodput(sizes, plan.saving, path, f"A save that pauses training for {plan.saving.pause_s:.3g} s")
