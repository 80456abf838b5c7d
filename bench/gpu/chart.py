"""The chart of `make gpu-bench`: speed and memory of the contestants relative to transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.bars import draw_bars, save_chart, two_panels
from bench.gpu.fast.targets import THEIRS

Row = Mapping[str, Any]

PANELS = (
    ("tokens_s", "tokens/s relative to transformers (higher is better)"),
    ("peak_gb", "peak memory relative to transformers (lower is better)"),
)


def compared(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the contestants of the sections in which transformers was measured, which is the first of each."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["name"] == THEIRS and "peak_gb" in row:
            mine = [one for one in rows if one["section"] == row["section"] and "peak_gb" in one]
            found[row["section"]] = [row, *(one for one in mine if one["name"] != THEIRS)]
    return found


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw the chart; returns False, and draws nothing, without results or without matplotlib."""
    sections = compared(rows)
    if not sections or find_spec("matplotlib") is None:
        return False
    lines = [(section, row) for section, mine in sections.items() for row in (None, *mine)]
    names = [section if row is None else row["name"] for section, row in lines]
    figure, axes = two_panels(len(lines), width_inches=12)
    for panel, (key, title) in zip(axes, PANELS):
        values = [math.nan if row is None else _ratio(row, sections[section][0], key) for section, row in lines]
        draw_bars(panel, names, values, title)
    axes[0].set_yticks(range(len(lines)), names, fontsize=8)
    for label, (_, row) in zip(axes[0].get_yticklabels(), lines):
        label.set_fontweight("bold" if row is None else "normal")
    axes[0].tick_params(axis="y", length=0)
    save_chart(figure, path)
    return True


def _ratio(row: Row, reference: Row, key: str) -> float:
    value, base = row.get(key), reference.get(key)
    return value / base if value and base else math.nan
