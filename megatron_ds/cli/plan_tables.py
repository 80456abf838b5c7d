"""A plan on the terminal: the run and its machines, memory by part, a step by part, and what limits it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ds.cli.display import format_count, format_rate
from megatron_ds.cli.table import WIDTH
from megatron_ds.planner.advice import Advice, describe_limit
from megatron_ds.planner.failures.fault_plan import FaultPlan, fault_lines
from megatron_ds.planner.pipeline.drawing import draw_timetable
from megatron_ds.planner.plan import DAY_S, GB, HOUR_S, Campaign, Plan
from megatron_ds.planner.plan_values import percent

BAR_WIDTH = 30
LEAST_SHARE = 0.001
NOTHING_HELPS = "no single setting makes it more than 2 % faster; --search compares complete layouts"
NOTHING_FITS = "no single setting makes it fit; try --search, more devices, or devices with more memory"
_NAME_WIDTH, _COLUMN_WIDTH = 24, 10


def print_plan(plan: Plan, campaign: Campaign | None, advice: Sequence[Advice], failures: FaultPlan) -> None:
    """Print a plan for the width of the terminal."""
    console = Console(highlight=False, soft_wrap=False)
    for name, text in head_lines(plan):
        _print_line(console, name, text)
    console.print()
    console.print(memory_table(plan, console.width))
    console.print()
    console.print(step_table(plan))
    if plan.given.layout.pipeline > 1:
        console.print()
        console.print(Text(_drawing(plan, console), no_wrap=True, overflow="crop"))
    console.print()
    for name, text in end_lines(plan, campaign, advice):
        _print_line(console, name, text, "bold red" if name == "limits" and not plan.fits else "")
        if name == "training":
            for about, line in fault_lines(failures):
                _print_line(console, about, line)


def _drawing(plan: Plan, console: Console) -> str:
    is_unicode = console.encoding.lower().startswith("utf")
    return draw_timetable(plan.time.timetable, console.width, unicode=is_unicode)


def _print_line(console: Console, name: str, text: str, style: str = "") -> None:
    """Print a name and a text, which on a terminal is wrapped behind the name."""
    room = console.width - WIDTH
    lines = textwrap.wrap(text, room, break_on_hyphens=False) if console.is_terminal and room > WIDTH else [text]
    for number, line in enumerate(lines):
        shown = Text(f"{name if number == 0 else '':<{WIDTH}}", style="bold")
        console.print(shown.append(line, style=style or "not bold"), soft_wrap=True)


def head_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield what is planned: name and text."""
    given, machines = plan.given, plan.given.machines
    config, rows = given.config, given.rows
    trained = plan.size.num_trained
    part = f", {format_count(trained)} of them trained" if trained < plan.size.num_params else ""
    length = f"{rows.seq_length:,}" + (f" + {rows.target_length:,}" if rows.target_length else "")
    yield "model", f"{given.core.family}, {format_count(plan.size.num_params)} parameters{part}, {_precision(plan)}"
    yield (
        "machines",
        f"{machines.nodes} x {machines.ranks_per_node} {plan.device.name} of {plan.device.memory_bytes / GB:.1f} GB"
        + (f"; {plan.network.name} between nodes" if machines.nodes > 1 else ""),
    )
    axes = {"tp": "tensor", "pp": "pipeline", "cp": "context", "dp": "data"}
    sizes = " x ".join(f"{short} {given.layout[axis]}" for short, axis in axes.items() if given.layout[axis] > 1)
    options = [
        "sequence parallel" if config.parallel.sequence else "",
        f"ep {given.expert_ranks}" if given.core.shape().num_experts else "",
        f"ZeRO-{given.engine.summary.zero_stage}",
        f"recompute {config.recompute}",
    ]
    yield "layout", f"{given.layout.world_size} = {sizes or 'dp 1'}; {', '.join(filter(None, options))}"
    yield (
        "batch",
        f"{config.global_batch_size:,} x {length} = {format_count(given.tokens_per_step)} tokens; "
        f"{given.num_micro_batches} micro-batch{'es' * (given.num_micro_batches > 1)} of {config.micro_batch_size} on "
        "each data rank",
    )


def _precision(plan: Plan) -> str:
    return plan.given.engine.summary.precision


def shown_stages(plan: Plan, width: int) -> list[int]:
    """Return the stages that have room in a table: all, or the first ones, the last and the fullest."""
    room = max(2, (width - _NAME_WIDTH) // _COLUMN_WIDTH)
    number = len(plan.memory)
    if number <= room:
        return list(range(number))
    chosen = {0, number - 1, plan.fullest.stage}
    for stage in range(1, number):
        if len(chosen) >= room:
            break
        chosen.add(stage)
    return sorted(chosen)


def memory_table(plan: Plan, width: int) -> Table:
    """Return the memory of a rank of each stage by part, in GB."""
    stages = shown_stages(plan, width)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("memory of a rank, GB", no_wrap=True, min_width=_NAME_WIDTH - 2)
    for stage in stages:
        table.add_column("" if len(plan.memory) == 1 else f"stage {stage}", justify="right", no_wrap=True, min_width=8)
    shown = [plan.memory[stage] for stage in stages]
    for name in _names([one.parts for one in shown]):
        table.add_row(name, *(_gb(one.parts.get(name, 0)) for one in shown))
    table.add_row("peak", *(_gb(one.peak_bytes) for one in shown), style="bold")
    shares = [one.peak_bytes / plan.limit_bytes for one in shown]
    style = "bold red" if max(shares) > 1 else ""
    table.add_row(f"of {plan.limit_bytes / GB:.1f} GB", *(percent(share) for share in shares), style=style)
    if len(plan.memory) > 1:
        table.add_row("micro-batches held", *(str(one.in_flight) for one in shown))
    for name in _names([one.host_parts for one in shown]):
        table.add_row(f"host: {name}", *(_gb(one.host_parts.get(name, 0)) for one in shown))
    return table


def _names(parts: Sequence[Mapping[str, int]]) -> list[str]:
    """Return the names of parts that are not zero everywhere."""
    names = dict.fromkeys(name for one in parts for name in one)
    return [name for name in names if any(one.get(name) for one in parts)]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.2f}" if num_bytes else "-"


def step_table(plan: Plan) -> Table:
    """Return the seconds of a step by part."""
    total_s = plan.time.total_s
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("a step", no_wrap=True, min_width=_NAME_WIDTH - 2)
    table.add_column("seconds", justify="right", no_wrap=True, min_width=8)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, seconds in shown_parts(plan.time.parts).items():
        share = seconds / total_s
        table.add_row(name, _seconds(seconds), percent(share, 1), "█" * round(BAR_WIDTH * share))
    table.add_row("all", _seconds(total_s), "", "", style="bold")
    return table


def shown_parts(parts: Mapping[str, float]) -> dict[str, float]:
    """Return the parts of a step with those below a thousandth of it added up, at the end."""
    least = LEAST_SHARE * sum(parts.values())
    found = {name: one for name, one in parts.items() if one >= least}
    rest = sum(one for one in parts.values() if one < least)
    return {**found, "other": rest} if rest else found


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds >= 0.1 else f"{seconds:.2g}"


def end_lines(plan: Plan, campaign: Campaign | None, advice: Sequence[Advice]) -> Iterator[tuple[str, str]]:
    """Yield speed, cost, what limits the run, and what to change: name and text."""
    time, world = plan.time, plan.given.machines.world_size
    yield (
        "speed",
        f"{format_rate(time.tokens_per_s)} tokens/s, {format_rate(time.tokens_per_s / world)} a device; "
        f"MFU {percent(time.mfu, 1)}" + (f", HFU {percent(time.hfu, 1)}" if time.recompute_s else ""),
    )
    yield "training", describe_campaign(campaign)
    yield "limits", describe_limit(plan)
    if not advice:
        yield "change", NOTHING_HELPS if plan.fits else NOTHING_FITS
    for number, one in enumerate(advice):
        yield "or" if number else "change", describe_advice(plan, one)


def describe_campaign(campaign: Campaign | None) -> str:
    """Return a line on the complete training run."""
    if campaign is None:
        return "train.epochs depends on the data; --tokens N gives time and cost"
    if math.isinf(campaign.slowdown):
        return "it makes no progress: the machines fail faster than they restart and save"
    cost = f", {campaign.cost:,.0f} at {campaign.price:g} an hour" if campaign.cost is not None else ""
    slower = campaign.slowdown - 1
    failures = f"of which failures and saves {percent(slower / campaign.slowdown, 1)}" if slower else "without failures"
    return (
        f"{format_count(campaign.tokens)} tokens in {campaign.steps:,} steps: {_duration(campaign.seconds)}, "
        f"{campaign.device_hours:,.0f} device hours{cost}, {failures}"
    )


def describe_advice(plan: Plan, advice: Advice) -> str:
    """Return a line on what to change."""
    step_s, peak_bytes = advice.plan.time.total_s, advice.plan.fullest.peak_bytes
    compared = f"{step_s:.3g} s a step"
    if plan.fits:
        compared += f", {percent(plan.time.total_s / step_s - 1)} faster"
    return f"{' '.join(advice.changes)}: {compared}, {peak_bytes / GB:.1f} of {plan.limit_bytes / GB:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds >= 2 * DAY_S:
        return f"{seconds / DAY_S:,.1f} days"
    return f"{seconds / HOUR_S:,.1f} hours" if seconds >= HOUR_S else f"{seconds / 60:,.1f} minutes"
