"""A part of a command: one process. Read before any package is installed, so it needs the standard library alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One process of a command.

    Attributes:
        name: its name in the log.
        module: the module that `python -m` runs.
        arguments: its arguments.
        limit_s: time limit, in seconds; it is shorter if the limit of the command comes first.
        group: neighbouring parts of one group run at the same time; "" = alone on the device.
        environment: additional environment variables.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    limit_s: float = 60.0
    group: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
