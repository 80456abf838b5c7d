"""Rows of a name and a value, printed as a table."""

from __future__ import annotations

from collections.abc import Iterable

WIDTH = 12

Row = tuple[str, str]
"""(name, value)."""


def show_rows(rows: Iterable[Row]) -> None:
    """Print rows as a table on a terminal, as plain lines elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if not console.is_terminal:
            print(f"{name:<{WIDTH}}{value}".rstrip())
        table.add_row(Text(name), Text(value, style="bold red" if "DAMAGED" in name + value else ""))
    if console.is_terminal:
        console.print(table)


def count(number: float) -> str:
    """Format a count in few characters: 512, 1.5K, 109.5M."""
    from megatron_ds.cli.display import format_count

    return format_count(number)


def size(num_bytes: int) -> str:
    """Format a number of bytes in few characters: 512B, 1.5KB, 12.3 GB."""
    return f"{count(num_bytes)}B" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"
