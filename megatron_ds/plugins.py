"""Plugins: modules of other packages that are imported because they register names.

They are named under `imports` in the run file, by `megatron-ds --import MODULE`, or by installed packages under the
entry point group `megatron_ds.plugins`. They are imported in every process before the run file is checked: ranks that
this process forks inherit them, ranks that a launcher starts import them themselves.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from megatron_ds.errors import ConfigError, show
from megatron_ds.log import quiet_libraries

GROUP = "megatron_ds.plugins"


def import_modules(names: Sequence[str], field: str = "imports[{}]") -> None:
    """Import modules by their dotted names; the current directory is searched first, as with `python -m`.

    Args:
        names: dotted names of the modules.
        field: the place where the user named them; {} stands for the index.

    Raises:
        ConfigError: a module does not exist, or raises an exception when it is imported.
    """
    if names:
        quiet_libraries()  # before the modules import them
    here = os.getcwd()
    if names and here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    for number, name in enumerate(names):
        place = f"{field.format(number)}={show(name)}"
        try:
            import_module(name)
        except Exception as problem:  # a plugin may raise anything
            if isinstance(problem, ModuleNotFoundError) and f"{name}.".startswith(f"{problem.name}."):
                raise ConfigError(
                    f"{place}: there is no module {problem.name}; start in its directory, add the directory to "
                    "PYTHONPATH, or install its package"
                ) from problem
            raise ConfigError(f"{place} raised {_reason(problem)}; fix it, or remove it") from problem


def load_entry_points() -> None:
    """Import the modules that installed packages name under the entry point group `megatron_ds.plugins`.

    Raises:
        ConfigError: one of them raises an exception when it is imported.
    """
    for point in _entry_points(tuple((entry, _changed_ns(entry)) for entry in sys.path)):
        quiet_libraries()
        try:
            point.load()
        except Exception as problem:
            package = point.dist.name if point.dist is not None else point.module
            raise ConfigError(
                f"the plugin {point.name}={point.value} of package {package} raised {_reason(problem)}; update or "
                f"uninstall {package}"
            ) from problem


@cache
def _entry_points(searched: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """Return the entry points of the group on `sys.path`; reading all packages' takes 20 ms, as long as a run file."""
    return tuple(entry_points(group=GROUP))


def _changed_ns(directory: str) -> int:
    """Return when an entry of `sys.path` was changed last, such as by an installation; 0 if it does not exist."""
    try:
        return os.stat(directory or ".").st_mtime_ns
    except OSError:
        return 0


def _reason(problem: Exception) -> str:
    """Return an exception and the line that raised it, on one line."""
    frames = traceback.extract_tb(problem.__traceback__)
    text = " ".join([f"{type(problem).__name__}:", *str(problem).split()])
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})"
