"""Targets as data, and their judgement from the results; `fast/targets.py` lists those of `make gpu-bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure of a result: its section, its name, and the key of the figure."""

    section: str
    name: str
    key: str

    @property
    def profile(self) -> str:
        """Name of the profile of what was measured."""
        return f"{self.section}, {self.name}"

    def find(self, rows: Sequence[Row]) -> float | None:
        """Return the figure from the last result of that name; None if it was not measured."""
        found = [row.get(self.key) for row in rows if (row["section"], row["name"]) == (self.section, self.name)]
        return float(found[-1]) if found and found[-1] is not None else None


@dataclass(frozen=True)
class Target:
    """A bound of a figure, or of its ratio to the best of others.

    Attributes:
        measure: what is measured, for the page.
        bound: the bound.
        at_least: True for a lower bound (higher is better), False for an upper bound.
        ours: figures of this package, of which the best counts.
        others: figures that it is divided by, of which the best counts; none = the figure itself is bounded.
        percent: the figure is shown in percent.
    """

    measure: str
    bound: float
    at_least: bool
    ours: tuple[Figure, ...]
    others: tuple[Figure, ...] = ()
    percent: bool = False

    @property
    def text(self) -> str:
        """The bound as text."""
        return f"{'>=' if self.at_least else '<='} {self.format(self.bound)}"

    def format(self, value: float) -> str:
        return f"{value:.1%}" if self.percent else f"{value:.3g}"


MET, MISSED, NOT_MEASURED = "met", "MISSED", "not measured"


@dataclass(frozen=True)
class Judgement:
    """A target with its measured value.

    Attributes:
        target: the target.
        value: the figure or ratio; None if it was not measured.
        missing: names of results that it needs and that are missing.
    """

    target: Target
    value: float | None
    missing: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The verdict: a bound that is kept counts as met only if all the others were measured."""
        if self.value is None:
            return NOT_MEASURED
        kept = self.value >= self.target.bound if self.target.at_least else self.value <= self.target.bound
        if not kept:
            return MISSED
        return NOT_MEASURED if self.missing else MET

    @property
    def measured(self) -> str:
        """The value as text, with what is missing."""
        if self.value is None:
            return ""
        text = self.target.format(self.value)
        return f"{text} (without {', '.join(self.missing)})" if self.missing else text


def judge(rows: Sequence[Row], targets: Sequence[Target]) -> list[Judgement]:
    """Return the judgement of each target."""
    return [_judge_one(rows, target) for target in targets]


def _judge_one(rows: Sequence[Row], target: Target) -> Judgement:
    best = max if target.at_least else min
    ours = [value for figure in target.ours if (value := figure.find(rows)) is not None]
    others = {figure: figure.find(rows) for figure in target.others}
    known = [value for value in others.values() if value]  # a time of 0 is too short to divide by
    missing = tuple(figure.name for figure, value in others.items() if not value)
    if not ours:
        return Judgement(target, None, tuple(figure.name for figure in target.ours))
    if target.others and not known:
        return Judgement(target, None, missing)
    return Judgement(target, best(ours) / best(known) if known else best(ours), missing)
