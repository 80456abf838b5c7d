"""A finding of an examination."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """The weight of a finding."""

    OK = "ok"
    NOTE = "note"
    """Runs work; some are slower, or need something that is missing."""
    PROBLEM = "problem"
    """Runs fail."""


@dataclass(frozen=True)
class Finding:
    """A property of this machine.

    Attributes:
        name: the property, such as `open files`.
        value: its value in one line.
        level: its weight.
        fix: what to try; empty if nothing is to be done.
    """

    name: str
    value: str
    level: Level = Level.OK
    fix: str = ""


def note(name: str, value: str, fix: str) -> Finding:
    """Return a finding that some runs are worse off with."""
    return Finding(name, value, Level.NOTE, fix)


def problem(name: str, value: str, fix: str) -> Finding:
    """Return a finding that runs fail with."""
    return Finding(name, value, Level.PROBLEM, fix)
