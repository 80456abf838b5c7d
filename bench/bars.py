"""Charts of bars: two figures of the same contestants side by side. Nothing of matplotlib's global state is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUR_COLOR, OTHER_COLOR = "#2b6cb0", "#a0aec0"


def two_panels(num_bars: int, width_inches: float) -> tuple[Figure, Any]:
    """Return a figure and its two axes, which share the positions of the bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, 0.8 + 0.26 * num_bars), layout="constrained")
    return figure, figure.subplots(1, 2, sharey=True)


def draw_bars(axes: Axes, labels: Sequence[str], values: Sequence[float], title: str) -> None:
    """Draw values as horizontal bars, with a line at 1; NaN = no bar. Bars of this package have their own color."""
    colors = [OUR_COLOR if label.startswith("ours") else OTHER_COLOR for label in labels]
    drawn = axes.barh(range(len(values)), values, color=colors)
    axes.bar_label(drawn, ["" if math.isnan(value) else f"{value:.2f}" for value in values], fontsize=7, padding=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.12, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)


def save_chart(figure: Figure, path: Path) -> None:
    """Write the image, with the first bar at the top."""
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)
