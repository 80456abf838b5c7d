"""The chart of `make gpu-bench`: speed and memory of the contestants relative to transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu.fast.targets import OURS, THEIRS

Row = Mapping[str, Any]

PANELS = (
    ("tokens_s", "tokens/s relative to transformers (higher is better)"),
    ("peak_gb", "peak memory relative to transformers (lower is better)"),
)
OUR_COLOR, OTHER_COLOR = "#2b6cb0", "#a0aec0"


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [(section, row) for section, mine in sections.items() for row in (None, *mine)]
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.8 + 0.26 * len(lines)), sharey=True, layout="constrained")
    for panel, (key, title) in zip(axes, PANELS):
        values = [math.nan if row is None else _ratio(row, sections[section][0], key) for section, row in lines]
        colors = [OUR_COLOR if row and row["name"].startswith(OURS) else OTHER_COLOR for _, row in lines]
        drawn = panel.barh(range(len(lines)), values, color=colors)
        panel.bar_label(drawn, ["" if math.isnan(one) else f"{one:.2f}" for one in values], fontsize=7, padding=2)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(title, fontsize=9)
        panel.set_xlim(left=0.0)
        panel.margins(x=0.12, y=0.01)
        panel.spines[["top", "right"]].set_visible(False)
    labels = [section if row is None else row["name"] for section, row in lines]
    axes[0].set_yticks(range(len(lines)), labels, fontsize=8)
    for label, (_, row) in zip(axes[0].get_yticklabels(), lines):
        label.set_fontweight("bold" if row is None else "normal")
    axes[0].tick_params(axis="y", length=0)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _ratio(row: Row, reference: Row, key: str) -> float:
    value, base = row.get(key), reference.get(key)
    return value / base if value and base else math.nan
