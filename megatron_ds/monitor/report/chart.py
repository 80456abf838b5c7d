"""A line chart as inline SVG, coloured by the page's style sheet, so that it follows light and dark.

A curve of many points is drawn as the mean of each bin of steps, in a band from its least to its largest value: spikes
stay visible, and the size does not depend on the length of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from megatron_ds.monitor.plot import bin_curve
from megatron_ds.monitor.report.columns import Array, Column

WIDTH, HEIGHT = 560, 230  # of the view box
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 24  # margins around the panel
MAX_BINS, MIN_BINS = 240, 60  # of a curve: a chart of many curves has fewer of each
MAX_DECADES = 300.0  # around 1 on a logarithmic scale, so that its ends are floats
MAX_DOTS = 40  # fewer points than this have dots
NUM_COLORS = 8
MAX_BANDS = 3  # curves; of more, only the means are drawn

Format = Callable[[float], str]


@dataclass(frozen=True)
class Curve:
    """A column with its name in the legend."""

    label: str
    column: Column


@dataclass(frozen=True)
class Scale:
    """The mapping of values to the coordinates of a panel.

    Attributes:
        low, high: the values at its ends; their logarithms if `is_log`.
        begin, end: the coordinates there.
    """

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def place(self, values: Array) -> Array:
        """Return coordinates; a value that cannot be drawn is NaN."""
        if self.is_log:
            values = np.log10(values, where=values > 0, out=np.full_like(values, math.nan))
        return self.begin + (values - self.low) / (self.high - self.low) * (self.end - self.begin)


def draw_chart(
    title: str, curves: Sequence[Curve], resumed: Sequence[int], show: Format, *, is_log: bool = False, unit: str = ""
) -> str:
    """Return a figure in HTML: title, legend, and the chart.

    Args:
        title: its title.
        curves: at least one, each with at least one point.
        resumed: steps after which the run was resumed; they are marked.
        show: the text of a value.
        is_log: whether values have a logarithmic scale.
        unit: of the values.
    """
    steps = np.concatenate([curve.column.steps for curve in curves])
    values = np.concatenate([curve.column.values for curve in curves])
    is_log = is_log and _spans_decades(values)
    x = Scale(*_span(steps), LEFT, WIDTH - RIGHT)
    y = Scale(*_limits(values, is_log), HEIGHT - BOTTOM, TOP, is_log)
    parts = [*_grid(x, y, show), *(_resumption(x, step) for step in resumed if x.low <= step <= x.high)]
    points = []
    max_bins = max(MIN_BINS, min(MAX_BINS, 2 * MAX_BINS // len(curves)))
    for number, curve in enumerate(curves):
        drawn, numbers = _draw(
            curve.column, x, y, f"c{number % NUM_COLORS}", max_bins, has_band=len(curves) <= MAX_BANDS
        )
        parts += drawn
        points.append([curve.label, *numbers])
    parts += _not_finite(x, curves)
    data = escape(json.dumps({"x": [x.low, x.high, x.begin, x.end], "curves": points}), quote=True)
    caption = escape(title) + (f' <span class="unit">{escape(unit)}</span>' if unit else "")
    return (
        f'<figure data-points="{data}"><figcaption>{caption}</figcaption>{_legend(curves, show)}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)} over the steps">'
        f"{''.join(parts)}</svg><output></output></figure>"
    )


def _spans_decades(values: Array) -> bool:
    """Return whether all finite values are positive, and the largest is more than ten times the least."""
    finite = values[np.isfinite(values)]
    return bool(finite.size) and bool(finite.min() > 0) and bool(finite.max() / 10 > finite.min())


def _span(steps: Array) -> tuple[float, float]:
    low, high = float(steps.min()), float(steps.max())
    return (low, high) if high > low else (low - 1, high + 1)


def _limits(values: Array, is_log: bool) -> tuple[float, float]:
    """Return the ends of the scale of values, with some room."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if is_log:
        low, high = math.log10(low), math.log10(high)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    if is_log:
        return max(low - room, -MAX_DECADES), min(high + room, MAX_DECADES)
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _grid(x: Scale, y: Scale, show: Format) -> list[str]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    parts = []
    if y.is_log:
        values = LogLocator(subs=(1, 3), numticks=6).tick_values(10**y.low, 10**y.high)
    else:
        values = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(y.low, y.high)
    for value, place in zip(values, y.place(np.asarray(values, dtype=np.float64))):
        if y.end <= place <= y.begin:
            parts.append(
                f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>'
                f'<text class="y" x="{LEFT - 6}" y="{place + 3.5:.1f}">{escape(show(value))}</text>'
            )
    for step in MaxNLocator(6, steps=[1, 2, 5, 10], integer=True).tick_values(x.low, x.high):
        if x.low <= step <= x.high:
            place = float(x.place(np.array([step]))[0])
            parts.append(f'<text class="x" x="{place:.1f}" y="{HEIGHT - 6}">{step:,.0f}</text>')
    return parts


def _draw(
    column: Column, x: Scale, y: Scale, color: str, max_bins: int, *, has_band: bool
) -> tuple[list[str], list[list[float]]]:
    """Return the elements of a curve, and its points as (step, value) pairs of rounded numbers."""
    bins = bin_curve(column.steps, column.values, max_bins)
    mean = np.divide(bins.total, bins.count, out=np.full_like(bins.total, math.nan), where=bins.count > 0)
    places = x.place(bins.steps)
    parts = []
    if has_band and bins.steps.size < column.steps.size:
        parts += [f'<path class="band {color}" d="{_band(places, y.place(bins.low), y.place(bins.high))}"/>']
    heights = y.place(mean)
    parts.append(f'<path class="line {color}" d="{_line(places, heights)}"/>')
    if column.steps.size <= MAX_DOTS:
        parts += [
            f'<circle class="dot {color}" cx="{at:.1f}" cy="{height:.1f}" r="2.5"/>'
            for at, height in zip(places, heights)
            if math.isfinite(height)
        ]
    shown = [[int(step), float(f"{value:.5g}")] for step, value in zip(bins.steps, mean) if math.isfinite(value)]
    return parts, shown


def _line(places: Array, heights: Array) -> str:
    """Return path data; a value that is not finite interrupts the line."""
    text, command = [], "M"
    for at, height in zip(places, heights):
        if math.isfinite(height):
            text.append(f"{command}{at:.1f} {height:.1f}")
            command = "L"
        else:
            command = "M"
    return "".join(text)


def _band(places: Array, low: Array, high: Array) -> str:
    finite = np.isfinite(low) & np.isfinite(high)
    there = [f"{at:.1f} {height:.1f}" for at, height in zip(places[finite], high[finite])]
    back = [f"{at:.1f} {height:.1f}" for at, height in zip(places[finite][::-1], low[finite][::-1])]
    return f"M{'L'.join([*there, *back])}Z" if there else ""


def _resumption(x: Scale, step: int) -> str:
    place = float(x.place(np.array([float(step)]))[0])
    return (
        f'<path class="resumed" d="M{place:.1f} {TOP}V{HEIGHT - BOTTOM}"><title>resumed after {step:,}</title></path>'
    )


def _not_finite(x: Scale, curves: Sequence[Curve]) -> list[str]:
    """Return crosses along the bottom at values that are not finite, at most one a bin."""
    steps = np.concatenate([curve.column.steps[~np.isfinite(curve.column.values)] for curve in curves])
    places = np.unique(np.round(x.place(np.unique(steps)) / 2) * 2)
    return [f'<path class="bad" d="M{at - 3:.0f} {HEIGHT - BOTTOM - 6}l6 6m0 -6l-6 6"/>' for at in places]


def _legend(curves: Sequence[Curve], show: Format) -> str:
    entries = []
    for number, curve in enumerate(curves):
        last, bad = curve.column.last, curve.column.num_not_finite
        text = f"{escape(curve.label)} <b>{escape(show(last)) if math.isfinite(last) else '–'}</b>"
        text += f' <span class="warn">{bad:,} not finite</span>' if bad else ""
        entries.append(f'<span class="key"><i class="c{number % NUM_COLORS}"></i>{text}</span>')
    return f'<p class="legend">{"".join(entries)}</p>'
