"""`loss.png`: training and validation loss over the steps, with the learning rate on a small panel below.

A mixture of experts has another panel between them: the tokens of its busiest and its least expert, of any layer,
divided by the mean. So has a model with a label head: the metrics of its validations.

It is drawn from `metrics.jsonl` alone, so it can be drawn again at any time. A long run is reduced to a few thousand
points, the minimum and maximum loss of each bin of steps, so that spikes stay visible at any length.
"""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_ds.atomic import replacing
from megatron_ds.monitor.metrics import StepMetrics, iter_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray

SIZE_INCHES = (8.0, 5.0)
DPI = 150
MAX_BINS = 1500  # about one per pixel of the panel's width
MIN_SMOOTHED = 50  # fewer points than this show their trend without smoothing
TRAIN_COLOR, VALID_COLOR, LR_COLOR, BAD_COLOR = "#1f5fa8", "#d9660d", "#5b6470", "#c0182b"
BUSIEST_COLOR, LEAST_COLOR = "#7b3fa0", "#2a8f74"
SCORE_COLORS = {"accuracy": "#2a8f74", "macro_f1": "#7b3fa0", "spearman": "#a0522d"}
"""Metrics of validations that are drawn, all of them at most 1."""
SET_COLORS = ("#2a8f74", "#7b3fa0", "#a0522d", "#b8860b", "#4a90a4", "#8b1a4a")
"""Colors of the named validation sets, in the order of their names, used again from the seventh on."""


@dataclass(frozen=True)
class Curves:
    """The columns of a metrics file that are drawn, each as float64; values that are not finite are NaN.

    `sets`: the losses on named validation sets. `least` and `busiest`: see `StepMetrics.expert_loads`; NaN without
    experts. `scores`: those of `SCORE_COLORS` that the validations have, by name.
    """

    steps: Array
    loss: Array
    lr: Array
    least: Array
    busiest: Array
    valid_steps: Array
    valid_loss: Array
    sets: Mapping[str, Array]
    scores: Mapping[str, Array]


@dataclass(frozen=True)
class Bins:
    """A curve in bins of neighbouring points; a bin without a finite value is NaN."""

    steps: Array
    low: Array
    high: Array
    total: Array  # sum of the finite values
    count: Array  # number of the finite values


def draw_loss(metrics_path: Path | str, png_path: Path | str, title: str) -> bool:
    """Draw the loss curves of a metrics file as a PNG of 1200 x 750 pixels; an old picture is replaced atomically.

    Args:
        metrics_path: A `metrics.jsonl`.
        png_path: the picture; its directory is created if missing.
        title: the title of the picture.

    Returns:
        True if there was anything to draw; otherwise nothing is written.

    Raises:
        DataError: the metrics file is missing or damaged.
    """
    curves = _read_curves(metrics_path)
    if curves.steps.size + curves.valid_steps.size == 0:
        return False
    figure = new_figure()
    _draw_panels(figure, curves, title)
    save_figure(figure, png_path)
    return True


def new_figure() -> "Figure":
    """Return an empty figure of 1200 x 750 pixels, which is drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", png_path: Path | str) -> None:
    """Write a figure as a PNG, whose directory is created if missing; an old picture is replaced atomically."""
    png_path = Path(png_path)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(png_path) as temporary:
        figure.savefig(temporary, format="png")


def bin_curve(steps: Array, values: Array, max_bins: int = MAX_BINS) -> Bins:
    """Divide (P,) points into at most `max_bins` bins of almost equal length, ignoring NaN."""
    starts = np.unique(np.linspace(0, steps.size, min(steps.size, max_bins), endpoint=False).astype(np.int64))
    finite = np.isfinite(values)
    return Bins(
        steps=steps[starts],
        low=np.fmin.reduceat(values, starts),
        high=np.fmax.reduceat(values, starts),
        total=np.add.reduceat(np.where(finite, values, 0.0), starts),
        count=np.add.reduceat(finite.astype(np.float64), starts),
    )


def smooth(bins: Bins) -> Array:
    """Return a weighted mean centred on each bin, over about a thirtieth of the run; no lag, NaN is ignored."""
    window = min(max(3, bins.steps.size // 30), bins.steps.size) // 2 * 2 + 1
    kernel = np.hanning(window + 2)[1:-1]
    half = window // 2
    weight = np.convolve(bins.count, kernel)[half : half + bins.steps.size]
    total = np.convolve(bins.total, kernel)[half : half + bins.steps.size]
    return np.divide(total, weight, out=np.full_like(total, math.nan), where=weight > 0)


def _read_curves(path: Path | str) -> Curves:
    # A million steps take 56 MB in arrays, and ten times as much as Python objects.
    names = ("steps", "loss", "lr", "least", "busiest", "valid_steps", "valid_loss")
    columns = {name: array("d") for name in names}
    steps, loss, lr, least, busiest, valid_steps, valid_loss = columns.values()
    scores = {name: array("d") for name in SCORE_COLORS}
    sets: dict[str, array[float]] = {}
    for metrics in iter_metrics(path):
        if isinstance(metrics, StepMetrics):
            steps.append(metrics.step)
            loss.append(metrics.loss)
            lr.append(metrics.lr)
            for column, load in zip((least, busiest), metrics.expert_loads or (math.nan, math.nan)):
                column.append(load)
        else:
            valid_steps.append(metrics.step)
            valid_loss.append(metrics.valid_loss)
            for name, column in scores.items():
                column.append(metrics.metrics.get(name, math.nan))
            for name in metrics.valid_losses.keys() - sets.keys():  # a set that a resumed run has added
                sets[name] = array("d", [math.nan] * (len(valid_steps) - 1))
            for name, column in sets.items():
                column.append(metrics.valid_losses.get(name, math.nan))
    found = {name: np.array(column, dtype=np.float64) for name, column in scores.items()}
    found = {name: values for name, values in found.items() if np.isfinite(values).any()}
    of_sets = {name: np.array(column, dtype=np.float64) for name, column in sorted(sets.items())}
    return Curves(
        scores=found, sets=of_sets, **{name: np.array(column, dtype=np.float64) for name, column in columns.items()}
    )


def _draw_panels(figure: "Figure", curves: Curves, title: str) -> None:
    between = [_draw_loads] * bool(np.isfinite(curves.busiest).any()) + [_draw_scores] * bool(curves.scores)
    heights = [3.6, *[1.7] * len(between), 1.2] if between else [4, 1]
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    loss_axes, *middle_axes, lr_axes = panels
    loss_axes.set_title(title, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    if curves.steps.size:
        _draw_training(loss_axes, curves)
        _draw_lr(lr_axes, curves)
    for draw, axes in zip(between, middle_axes):
        draw(axes, curves)
    if curves.valid_steps.size:
        _draw_validation(loss_axes, curves)
        _draw_sets(loss_axes, curves)
    _mark_non_finite(loss_axes, curves)
    loss_axes.set_ylabel("loss" if curves.scores else "loss (nats per token)")
    lr_axes.set_ylabel("learning\nrate" if between else "learning rate")
    lr_axes.set_xlabel("step")
    for axes in panels:
        style_axes(axes)
        axes.tick_params(labelbottom=axes is lr_axes)
    loss_axes.legend(frameon=False, fontsize=9, loc="upper right")
    _style_steps(lr_axes)
    steps = np.concatenate([curves.steps, curves.valid_steps])
    if steps.min() == steps.max():
        lr_axes.set_xlim(steps[0] - 1, steps[0] + 1)  # by default the axis would show fractions of a step
    figure.align_ylabels()


def _draw_training(axes: "Axes", curves: Curves) -> None:
    bins = bin_curve(curves.steps, curves.loss)
    if bins.steps.size == curves.steps.size:
        steps, loss = curves.steps, curves.loss
    else:
        steps, loss = np.repeat(bins.steps, 2), np.stack([bins.low, bins.high], axis=1).ravel()
    label = f"training{_last_value(curves.loss)}"
    if np.count_nonzero(np.isfinite(curves.loss)) < MIN_SMOOTHED:
        axes.plot(steps, loss, color=TRAIN_COLOR, linewidth=1.6, marker="o", markersize=3.5, label=label)
        return
    axes.plot(steps, loss, color=TRAIN_COLOR, linewidth=0.8, alpha=0.3, label=label)
    axes.plot(bins.steps, smooth(bins), color=TRAIN_COLOR, linewidth=1.8, label="training, smoothed")


def _draw_validation(axes: "Axes", curves: Curves) -> None:
    few = curves.valid_steps.size <= MIN_SMOOTHED
    axes.plot(
        curves.valid_steps,
        curves.valid_loss,
        color=VALID_COLOR,
        linestyle="none" if few else "-",
        linewidth=1.2,
        marker="o",
        markersize=6 if few else 2,
        markeredgecolor="white",
        markeredgewidth=0.8 if few else 0,
        label=f"validation{_last_value(curves.valid_loss)}",
        zorder=4,
    )


def _draw_sets(axes: "Axes", curves: Curves) -> None:
    """Draw the losses on named validation sets."""
    marker = "o" if curves.valid_steps.size <= MIN_SMOOTHED else None
    for number, (name, values) in enumerate(curves.sets.items()):
        color = SET_COLORS[number % len(SET_COLORS)]
        label = f"{name}{_last_value(values)}"
        axes.plot(curves.valid_steps, values, color=color, linewidth=1.0, marker=marker, markersize=3.5, label=label)


def _draw_lr(axes: "Axes", curves: Curves) -> None:
    bins = bin_curve(curves.steps, curves.lr)
    marker = "o" if curves.steps.size == 1 else None
    axes.plot(bins.steps, bins.high, color=LR_COLOR, linewidth=1.4, marker=marker, markersize=3.5)


def _draw_loads(axes: "Axes", curves: Curves) -> None:
    """Draw the tokens of the busiest and of the least expert: both 1 in balance, E/k and 0 if all choose the same k."""
    from matplotlib.ticker import MaxNLocator

    busiest, least = bin_curve(curves.steps, curves.busiest), bin_curve(curves.steps, curves.least)
    for label, bins, values, last, color in (
        ("busiest expert", busiest, busiest.high, curves.busiest, BUSIEST_COLOR),
        ("least", least, least.low, curves.least, LEAST_COLOR),
    ):
        marker = "o" if curves.steps.size == 1 else None
        text = f"{label}{_last_value(last)}"
        axes.plot(bins.steps, values, color=color, linewidth=1.4, marker=marker, markersize=3.5, label=text)
    axes.axhline(1.0, color="#9aa1ab", linewidth=0.8, linestyle="--")
    axes.set_ylabel("tokens / mean")
    axes.set_ylim(bottom=0, top=1.35 * max(1.0, np.nanmax(busiest.high)))  # room for the legend
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)


def _draw_scores(axes: "Axes", curves: Curves) -> None:
    """Draw the metrics of validations."""
    from matplotlib.ticker import MaxNLocator

    marker = "o" if curves.valid_steps.size <= MIN_SMOOTHED else None
    for name, values in curves.scores.items():
        label = f"{name.replace('_', ' ')}{_last_value(values)}"
        color = SCORE_COLORS[name]
        axes.plot(curves.valid_steps, values, color=color, linewidth=1.4, marker=marker, markersize=4, label=label)
    axes.set_ylabel("validation")
    low = min(float(np.nanmin(values)) for values in curves.scores.values())
    axes.set_ylim(low - 0.5 * (1.05 - low), 1.05)  # room for the legend
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.legend(frameon=False, fontsize=9, loc="lower right", ncols=len(curves.scores))


def _mark_non_finite(axes: "Axes", curves: Curves) -> None:
    """Draw crosses along the bottom at losses that were NaN or infinite: a gap in a line is easily overlooked."""
    bad = np.concatenate([curves.steps[~np.isfinite(curves.loss)], curves.valid_steps[~np.isfinite(curves.valid_loss)]])
    if bad.size == 0:
        return
    shown = bad[:: math.ceil(bad.size / MAX_BINS)]
    axes.plot(
        shown,
        np.full(shown.size, 0.02),
        transform=axes.get_xaxis_transform(),
        linestyle="none",
        marker="x",
        markersize=5,
        color=BAD_COLOR,
        clip_on=False,
        label=f"not finite ({bad.size:,} value{'s' if bad.size > 1 else ''})",
    )


def style_axes(axes: "Axes") -> None:
    """Give a panel a light grid and no frame."""
    axes.grid(color="#e3e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa1ab")
    axes.tick_params(color="#9aa1ab", labelsize=9)
    axes.margins(x=0.02)


def _style_steps(lr_axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    lr_axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True))
    lr_axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    lr_axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
    lr_axes.yaxis.set_major_formatter(FuncFormatter(lambda lr, _: _format_lr(lr)))
    lr_axes.set_ylim(bottom=0)


def _last_value(values: Array) -> str:
    finite = values[np.isfinite(values)]
    return f" (last {finite[-1]:#.4g})" if finite.size else ""


def _format_lr(lr: float) -> str:
    """Format a learning rate as 3e-4 rather than 0.0003, as in a run file."""
    if lr == 0:
        return "0"
    mantissa, exponent = f"{lr:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
