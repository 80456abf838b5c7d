"""`goodput.png`: the goodput of runs with failures over the interval between checkpoints, one curve for each size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_ds.monitor.plot import new_figure, save_figure, style_axes
from megatron_ds.planner.failures.closed_forms import (
    Faults,
    Saving,
    best_interval_s,
    expected_goodput,
    young_interval_s,
)
from megatron_ds.planner.failures.fault_plan import describe_time
from megatron_ds.planner.failures.goodput import simulate_goodput
from megatron_ds.planner.plan_values import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f5fa8", "#d9660d", "#2a8f74", "#7b3fa0", "#a0522d", "#b8860b")
SMALLEST, LARGEST = 1 / 16, 32  # intervals that are drawn, as multiples of the best ones


def draw_goodput(
    sizes: Mapping[str, Faults], saving: Saving, png_path: Path | str, title: str, *, days: float = 30.0, seed: int = 0
) -> None:
    """Draw the goodput of simulated runs over the interval, with its closed form and Young's interval.

    Args:
        sizes: rates and costs of failures by name of a curve, such as "16,384 GPUs".
        saving: cost of a checkpoint.
        png_path: the picture, of 1200 x 750 pixels; an old one is replaced.
        title: of the picture.
        days, seed: see `simulate_goodput`.
    """
    best = [best_interval_s(saving.pause_s, faults.mtbf_s) for faults in sizes.values()]
    low = max(SMALLEST * min(best), saving.write_s, 1.0)
    intervals_s = np.geomspace(low, max(LARGEST * max(best), 2 * low), 33)
    figure = new_figure()
    axes = figure.subplots()
    least = 1.0
    for (name, faults), color, best_s in zip(sizes.items(), COLORS * math.ceil(len(sizes) / len(COLORS)), best):
        _draw_curve(axes, name, intervals_s, saving, faults, color, days, seed)
        at_best = expected_goodput(max(best_s, low), saving, faults)
        least = min(least, at_best)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    axes.set_xscale("log")
    axes.set_xlabel("training between two checkpoints")
    axes.set_ylabel("goodput (% of the time)")
    shown = min(100.0, max(600 * (1 - least), 2.0))
    axes.set_ylim(100 - shown, 100 + 0.02 * shown)  # markers at 100 % are whole
    style_axes(axes)
    _style_intervals(axes)
    axes.plot([], [], color="#5b6470", linestyle="none", marker="o", markersize=4, label=f"simulated, {days:g} days")
    axes.legend(frameon=False, fontsize=9, loc="best")
    save_figure(figure, png_path)


def _draw_curve(
    axes: Axes, name: str, intervals_s: np.ndarray, saving: Saving, faults: Faults, color: str, days: float, seed: int
) -> None:
    found = simulate_goodput(intervals_s.tolist(), saving, faults, days=days, seed=seed)
    fine = np.geomspace(intervals_s[0], intervals_s[-1], 300)
    expected = [100 * expected_goodput(interval, saving, faults) for interval in fine]
    young_s = young_interval_s(saving.pause_s, faults.mtbf_s)
    name_of_best = "Young" if young_s >= intervals_s[0] else "as often as it is written"
    young_s = max(young_s, intervals_s[0])
    at_young = expected_goodput(young_s, saving, faults)
    axes.plot(
        fine, expected, color=color, linewidth=1.4, label=f"{name}: a failure every {describe_time(faults.mtbf_s)}"
    )
    axes.errorbar(  # bars of two standard errors
        intervals_s,
        [100 * one.share for one in found],
        yerr=[200 * one.error for one in found],
        color=color,
        linestyle="none",
        marker="o",
        markersize=4,
        elinewidth=0.8,
    )
    axes.plot(
        [young_s],
        [100 * at_young],
        linestyle="none",
        marker="D",
        markersize=9,
        color=color,
        markeredgecolor="white",
        zorder=4,
        label=f"{name_of_best}: every {describe_time(young_s)}, {percent(at_young, 1)}",
    )


def _style_intervals(axes: Axes) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    seconds = [1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 2 * 3600, 6 * 3600, 12 * 3600, 86400, 3 * 86400, 10 * 86400]
    axes.xaxis.set_major_locator(FixedLocator([one for one in seconds if low <= one <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: describe_time(value)))
