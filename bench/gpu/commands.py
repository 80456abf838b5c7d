"""The commands and their parts."""

from __future__ import annotations

from dataclasses import dataclass

from bench.gpu.fast.parts import PARTS as FAST
from bench.gpu.part import Part
from bench.gpu.right.parts import PARTS as RIGHT


@dataclass(frozen=True)
class Command:
    """A command: the half of the page that it writes, its parts in order, and its time limit in seconds."""

    half: str
    parts: tuple[Part, ...]
    limit_s: float = 420.0


ENVIRONMENT = Part("environment", "bench.gpu.environment")

COMMANDS = {"check": Command("right", (ENVIRONMENT, *RIGHT)), "bench": Command("fast", (ENVIRONMENT, *FAST))}
