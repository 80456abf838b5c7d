"""Draw `schedules.png`: the learning rate of every built-in schedule over the steps of a run.

Run `python docs/images/draw_schedules.py` from the repository's root after a schedule has changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_ds.config import OptimizerSection, ScheduleSection
from megatron_ds.training.lr_schedule import learning_rate

STEPS, WARMUP, PEAK, LEAST = 1000, 50, 3e-4, 3e-5
PANELS: tuple[tuple[tuple[str, dict[str, Any]], ...], ...] = (
    (("constant", {}), ("linear", {}), ("cosine", {}), ("polynomial", {"power": 2.0}), ("inverse_sqrt", {})),
    tuple(("wsd", {"decay": form, "decay_share": 0.3}) for form in ("linear", "1-sqrt", "cosine", "exponential")),
    (
        ("cosine_with_restarts", {"cycles": 3}),
        ("cosine_with_restarts", {"cycles": 3, "length_factor": 2.0, "peak_factor": 0.6}),
    ),
)


def draw() -> Figure:
    """Return a figure of three panels: one decay, a decay at the end, restarts."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, curves in zip(figure.subplots(1, 3, sharey=True), PANELS):
        for name, options in curves:
            schedule = ScheduleSection(name=name, warmup_steps=WARMUP, min_lr=LEAST, options=options)
            rates = [learning_rate(step, STEPS, OptimizerSection(lr=PEAK), schedule) for step in range(STEPS)]
            shown = ", ".join(f"{key}: {value}" for key, value in options.items())
            axes.plot(range(1, STEPS + 1), rates, label=f"{name} {{{shown}}}" if shown else name)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("learning rate")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("schedules.png"), dpi=90)
