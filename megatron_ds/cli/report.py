"""`megatron-ds report`: write the page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_ds.paths import expanded

HELP = """Write report.html about a run: its curves, data, settings, environment and resumptions.

A run writes it at its end. This command writes it at any time, also while the run trains. The page
opens in a browser without a network.

Examples:

\b
  megatron-ds report out/run
  megatron-ds report out/run --html report.html
"""


def report(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The run's output directory.", parser=expanded)],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page (default: OUTPUT/report.html).", parser=expanded)
    ] = None,
) -> None:
    """Run the command; see HELP."""
    from megatron_ds.monitor.report import write_report

    path = write_report(output, html)
    print(f"wrote {path}: {path.stat().st_size / 1e3:,.0f} kB")
