"""The option `--import`, for commands without a run file."""

from __future__ import annotations

from typing import Annotated

import typer

from megatron_ds.plugins import import_modules, load_entry_points

Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a module that registers further families; may be given several times.",
    ),
]


def load_plugins(imports: list[str] | None) -> None:
    """Import the modules that the user names and the plugins of installed packages.

    Raises:
        ConfigError: a module does not exist or raises an exception.
    """
    load_entry_points()
    import_modules(imports or [], "--import")
