"""`megatron-ds families`: show the supported families and what is proven of each."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ds.cli.plugins import Imports, load_plugins

if TYPE_CHECKING:
    from megatron_ds.hf.support_table import Support

HELP = """Show the families of models that are read, trained and written, by the model_type in config.json.

What is proven is a comparison with transformers in fp32: outputs, loss and every gradient of so many configs, at so
many layouts of ranks, and the losses of so many training steps. Labels are what its heads for classes and scores are
of: texts, tokens or both. `megatron-ds verify` compares a directory of yours.

Examples:

\b
  megatron-ds families
  megatron-ds families qwen
  megatron-ds families --json
"""


def families(
    text: Annotated[
        str, typer.Argument(metavar="[TEXT]", help="Show those with this text in model_type, class or models.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    imports: Imports = None,
) -> None:
    """Run the command; see HELP."""
    load_plugins(imports)
    from megatron_ds.errors import ConfigError
    from megatron_ds.hf.support_table import support

    found = [one for one in support() if text.lower() in f"{one.model_type} {one.architecture} {one.known}".lower()]
    if not found:
        raise ConfigError(
            f"TEXT={text}: no family has this in its model_type, class or models; try megatron-ds families"
        )
    if json:
        print(json_module.dumps([asdict(one) for one in found], indent=2))
    else:
        _show(found)


def _show(found: list[Support]) -> None:
    """Print a table on a terminal, and lines with columns of one width elsewhere."""
    from rich.console import Console
    from rich.table import Table

    titles = ("model_type", "class in transformers", "such as", "labels", "proven")
    lines = [(one.model_type, one.architecture, one.known, one.labels, one.proven) for one in found]
    console = Console()
    if console.is_terminal:
        table = Table(*titles, box=None, padding=(0, 2, 0, 0), header_style="bold")
        for line in lines:
            table.add_row(*line)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(titles, *lines)]
    for line in (titles, *lines):
        print("  ".join(part.ljust(width) for part, width in zip(line, widths)).rstrip())
