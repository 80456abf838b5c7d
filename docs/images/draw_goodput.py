"""Draw `goodput.png`: goodput over the interval between checkpoints, at 1,024 and 16,384 GPUs.

Run `python docs/images/draw_goodput.py` from the repository's root after the model of failures has changed.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ds.planner.failures.closed_forms import Faults, Saving
from megatron_ds.planner.failures.goodput_plot import draw_goodput

SAVING = Saving(pause_s=10.0)

if __name__ == "__main__":
    sizes = {"1,024 GPUs": Faults(128), "16,384 GPUs": Faults(2048)}
    draw_goodput(sizes, SAVING, Path(__file__).with_name("goodput.png"), "A save that pauses training for 10 s")
