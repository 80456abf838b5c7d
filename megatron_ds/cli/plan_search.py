"""`megatron-ds plan --search`: the fastest layouts of a run, as a table and as run files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_ds.errors import ConfigError, show
from megatron_ds.paths import expanded

if TYPE_CHECKING:
    from megatron_ds.planner.search.branch_and_bound import SearchResult
    from megatron_ds.planner.search.find_layouts import SearchInput

Search = Annotated[bool, typer.Option("--search", help="Find the fastest layouts that fit.")]
Write = Annotated[
    Path | None, typer.Option("--write", metavar="DIR", parser=expanded, help="Write a run file for each of them.")
]
COLUMNS = ("", "layout", "data", "s/step", "tokens/s", "GB", "host GB")


def check_search(search: bool, write: Path | None, stragglers: str | None) -> None:
    """Refuse options that do not go with a search, or with none.

    Raises:
        ConfigError: there is such an option.
    """
    if write is not None and not search:
        raise ConfigError(f"--write={write} writes the layouts that a search finds; try --search")
    if search and stragglers is not None:
        raise ConfigError(
            f"--stragglers={show(stragglers)} is for one layout, and --search compares them with the usual slowness; "
            "try it on the run files of --write"
        )


def search_and_print(searched: SearchInput, limit_bytes: int, write: Path | None, num_found: int = 5) -> SearchResult:
    """Find the fastest layouts, print them, and write run files.

    Args:
        searched: the run and the machines.
        limit_bytes: memory of a device that the run may use.
        write: directory of the run files; None = none are written.
        num_found: number of layouts.

    Raises:
        MegatronDSError: no layout is legal or fits, or a file cannot be written.
    """
    from megatron_ds.planner.search.branch_and_bound import Limits
    from megatron_ds.planner.search.find_layouts import find_layouts
    from megatron_ds.planner.search.layout_files import write_layouts

    result = find_layouts(searched, Limits(limit_bytes), num_found=num_found, compiles=True)
    tokens, world = searched.given.tokens_per_step, searched.machines.world_size
    Console().print(_table(result, tokens, world))
    counts = result.counts
    print(f"{counts.candidates:,} candidates, of which {counts.estimated[-1]} were planned in full")
    if write is not None:
        for path in write_layouts(result.found, write, world, tokens):
            print(f"wrote {path}")
    return result


def _table(result: SearchResult, tokens: int, world: int) -> Table:
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in layout_rows(result, tokens, world):
        table.add_row(*row)
    return table


def layout_rows(result: SearchResult, tokens: int, world: int) -> list[list[str]]:
    """Return the cells of the found layouts, in the order of `COLUMNS`."""
    rows = []
    for number, one in enumerate(result.found, 1):
        estimate, data = one.estimate, world // one.candidate.model_ranks
        times = f"{estimate.step_s:.3g}", f"{tokens / estimate.step_s:,.0f}"
        sizes = f"{estimate.device_bytes / 1e9:.1f}", f"{estimate.host_bytes / 1e9:.1f}"
        rows.append([str(number), one.candidate.describe(), str(data), *times, *sizes])
    return rows


def search_facts(result: SearchResult, tokens: int) -> list[dict[str, Any]]:
    """Return the found layouts as data, the fastest first."""
    from dataclasses import asdict

    return [
        {
            **asdict(one.candidate),
            "step_s": one.estimate.step_s,
            "tokens_per_s": tokens / one.estimate.step_s,
            "device_bytes": one.estimate.device_bytes,
            "host_bytes": one.estimate.host_bytes,
        }
        for one in result.found
    ]
