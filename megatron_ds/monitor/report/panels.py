"""The charts of a report: which columns each of them draws, and in which unit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ds.monitor.report.chart import Curve, Format, draw_chart
from megatron_ds.monitor.report.columns import Column, Columns

MAX_CURVES = 16
MAX_OTHER = 12  # charts of numbers that have none in the table below


def _digits(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{value:.4g}%"


@dataclass(frozen=True)
class Panel:
    """A chart.

    Attributes:
        title: its title.
        names: patterns of whole names of columns, each with its label; `\\1` in it stands for the pattern's group.
        unit: of the drawn values.
        factor: from the columns' unit to that of the chart.
        show: the text of a drawn value.
        is_log: whether values have a logarithmic scale, if all are positive.
    """

    title: str
    names: dict[str, str]
    unit: str = ""
    factor: float = 1.0
    show: Format = _digits
    is_log: bool = False

    def curves(self, columns: Columns) -> list[tuple[str, Curve]]:
        """Return the columns that this chart draws, by their names."""
        found = []
        for pattern, label in self.names.items():
            for name, column in columns.items():
                if match := re.fullmatch(pattern, name):
                    scaled = Column(column.steps, column.values * self.factor)
                    found.append((name, Curve(match.expand(label), scaled)))
        return found


PANELS = (
    Panel("Loss", {"train/loss": "training", "valid/loss": "validation"}),
    Panel("Losses of validation sets", {"valid/losses/(.*)": r"\1"}),
    Panel("Learning rate", {"train/lr": "base", "train/lrs/(.*)": r"\1"}, show=lambda value: f"{value:.3g}"),
    Panel("Gradient norm before clipping", {"train/grad_norm": ""}, is_log=True),
    Panel("Tokens with loss per second", {"train/tokens_per_s": ""}),
    Panel("Model FLOPs utilisation", {"train/mfu": ""}, "%", 100.0, _percent),
    Panel("Model FLOP/s of a rank", {"train/tflops_per_rank": ""}, "TFLOP/s"),
    Panel("Time of a step", {"train/step_s": "step", "train/data_s": "waiting for data"}, "s"),
    Panel(
        "Computing time of ranks",
        {"train/ranks/compute_s_max": "slowest rank", "train/ranks/compute_s_median": "median"},
        "s",
    ),
    Panel(
        "Waiting time of ranks",
        {
            "train/ranks/communication_s_median": "for one another, median",
            "train/ranks/data_s_max": "for data, slowest rank",
            "train/ranks/data_s_median": "for data, median",
        },
        "s",
    ),
    Panel("Slow ranks", {"train/ranks/num_slow": ""}),
    Panel(
        "Memory of the first rank",
        {"train/peak_memory_bytes": "peak", "train/reserved_memory_bytes": "peak of torch's allocator"},
        "GB",
        1e-9,
    ),
    Panel("Tokens with loss per step", {"train/tokens": ""}),
    Panel("Terms of the loss", {"train/terms/(.*)": r"\1"}),
    Panel(
        "Tokens of an expert",
        {"train/moe_tokens_max": "most", "train/moe_tokens_mean": "mean", "train/moe_tokens_min": "fewest"},
    ),
    Panel("Utilisation of GPUs", {"system/gpu(\\d+)_utilization_percent": r"GPU \1"}, "%", show=_percent),
    Panel("Memory of GPUs", {"system/gpu(\\d+)_memory_bytes": r"GPU \1"}, "GB", 1e-9),
    Panel("Power of GPUs", {"system/gpu(\\d+)_power_watts": r"GPU \1"}, "W"),
    Panel("Temperature of GPUs", {"system/gpu(\\d+)_temperature_celsius": r"GPU \1"}, "°C"),
    Panel(
        "Memory of the host",
        {"system/host_memory_bytes": "all processes", "system/process_memory_bytes": "the first rank"},
        "GB",
        1e-9,
    ),
    Panel("Use of the host's processors", {"system/host_cpu_percent": ""}, "%", show=_percent),
)


def draw_panels(columns: Columns, resumed: Sequence[int]) -> Iterator[str]:
    """Yield the charts of all columns.

    Numbers that no panel names, such as metrics of an objective, have charts of their own, those of training and of
    validation in one.

    Args:
        columns: those of a metrics file.
        resumed: steps after which the run was resumed.
    """
    left = set(columns)
    for panel in PANELS:
        curves = panel.curves(columns)
        left -= {name for name, _ in curves}
        if curves:
            yield _draw(panel, [curve for _, curve in curves], resumed)
    others = dict.fromkeys(name.partition("/")[2] for name in columns if name in left)
    for name in list(others)[:MAX_OTHER]:
        panel = Panel(
            name.replace("_", " "), {f"train/{re.escape(name)}": "training", f"valid/{re.escape(name)}": "validation"}
        )
        yield _draw(panel, [curve for _, curve in panel.curves(columns)], resumed)
    if len(others) > MAX_OTHER:
        yield f'<p class="note">{len(others) - MAX_OTHER} more are in metrics.jsonl.</p>'


def _draw(panel: Panel, curves: Sequence[Curve], resumed: Sequence[int]) -> str:
    return draw_chart(panel.title, curves[:MAX_CURVES], resumed, panel.show, is_log=panel.is_log, unit=panel.unit)
