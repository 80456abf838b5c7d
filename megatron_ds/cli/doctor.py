"""`megatron-ds doctor`: examine this machine."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ds.paths import expanded

if TYPE_CHECKING:
    from megatron_ds.doctor import Finding
    from megatron_ds.parallel.rank_info import RankInfo

HELP = """Examine this machine: what a run needs, what is missing, and how to get it.

It shows the versions of packages, devices and compilers, memory, limits, the speed of the disk, network interfaces and
RDMA, and starts ranks that sum tensors, to see whether they can communicate, and how fast. Under torchrun or srun the
launcher's ranks do that. The exit status is 1 if something is found that runs fail with.

Examples:

\b
  megatron-ds doctor
  megatron-ds doctor --nproc 8 --path /scratch/runs
  megatron-ds doctor --json > doctor.json
  srun --nodes 2 --ntasks-per-node 8 python -m megatron_ds doctor
"""

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor(
    nproc: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Ranks that communicate (default: one for each device, or 2 on a CPU; 0: none)."
        ),
    ] = None,
    path: Annotated[
        Path, typer.Option(metavar="DIR", parser=expanded, help="Directory whose disk is tested (default: this one).")
    ] = Path("."),
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Run the command; see HELP."""
    from megatron_ds.errors import ConfigError
    from megatron_ds.log import quiet_libraries

    if not path.is_dir():
        raise ConfigError(f"--path={path} is not a directory; try one in which runs write")
    quiet_libraries()
    from megatron_ds.doctor import Level, examine
    from megatron_ds.engine import device_count, device_type
    from megatron_ds.training.launch import check_devices, share_cores

    launched = _launched()
    num_devices = device_count() if device_type() != "cpu" else 2
    num_ranks = nproc if nproc is not None else max(num_devices, 1)
    if launched is None and num_ranks > 1:
        check_devices(num_ranks, device_type(), num_devices)
        share_cores(num_ranks)
    shows = (launched is None or launched.rank == 0) and not json
    found: dict[str, list[Finding]] = {}
    for examination in examine(path, num_ranks, launched):
        group = found.setdefault(examination.title, [])
        for finding in examination.findings:
            if shows and not group:
                print(f"\n{examination.title}")
            group.append(finding)
            if shows:
                _show(finding)
    levels = [one.level for group in found.values() for one in group]
    if json and (launched is None or launched.rank == 0):
        print(json_module.dumps({title: [_plain(one) for one in group] for title, group in found.items()}, indent=2))
    elif shows:
        print(f"\n{_verdict(levels.count(Level.PROBLEM), levels.count(Level.NOTE))}")
    if Level.PROBLEM in levels:
        raise typer.Exit(1)


def _launched() -> RankInfo | None:
    """Return the rank that a launcher gave this process; None also if its variables are wrong, which is a finding."""
    from megatron_ds.errors import TopologyError
    from megatron_ds.parallel.rank_info import rank_from_environment

    try:
        return rank_from_environment()
    except TopologyError:
        return None


def _show(finding: Finding) -> None:
    """Print a finding, and below it what to do about it; in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    line = Text(f"  {finding.level:<9}", style=_STYLES[finding.level])
    line.append(f"{finding.name:<16}", style="default").append(finding.value, style="default")
    console = Console(soft_wrap=True, highlight=False)
    console.print(line)
    if finding.fix:
        console.print(Text(f"{'':<27}try {finding.fix}"))


def _plain(finding: Finding) -> dict[str, str]:
    from dataclasses import asdict

    return {name: str(value) for name, value in asdict(finding).items()}


def _verdict(problems: int, notes: int) -> str:
    """Return the last line."""
    noted = f", {notes} note{'s' * (notes != 1)}" if notes else ""
    if problems:
        return f"{problems} problem{'s' * (problems != 1)}{noted}: runs would fail on this machine"
    return f"no problem{noted}: runs work on this machine"
