"""The sections about pipelines and failures of docs/planning.md show what the planner computes."""

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.planner.failures.closed_forms import (
    Faults,
    Saving,
    daly_interval_s,
    expected_goodput,
    spares_needed,
    young_interval_s,
)
from megatron_ds.planner.failures.fault_plan import describe_time
from megatron_ds.planner.failures.goodput import simulate_goodput
from megatron_ds.planner.pipeline.drawing import draw_timetable
from megatron_ds.planner.pipeline.stragglers import Jitter
from megatron_ds.planner.pipeline.timetable import StageTimes, simulate, step_times

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


def rows(section: str, columns: int) -> list[list[str]]:
    """Cells of the tables with so many columns in a section, without heads."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [row for row in cells if len(row) == columns and re.match(r"[\d,]+( %.*)?$|both", row[0])]


def test_drawing() -> None:
    drawn = draw_timetable(simulate([StageTimes(0.010, 0.020)] * 4, 8, message_s=0.0005), 80)
    assert f"```text\n{drawn}\n```" in PAGE


def test_bubble_series() -> None:
    found = [row for row in rows("The pipeline's timetable", 4) if row[1].endswith(" s")]
    assert len(found) == 4
    for micro_batches, measured, planned, total in found:
        seconds = simulate([StageTimes(0.743 / 4, 0.743 * 3 / 4)] * 12, int(micro_batches)).duration_s
        assert planned == f"{seconds:.1f} s" and total == f"{seconds + 3.87:.1f} s"
        assert float(measured.split()[0]) == pytest.approx(seconds + 3.87, rel=0.004)


def test_stragglers() -> None:
    found = [row for row in rows("The pipeline's timetable", 4) if row[1].endswith(" %")]
    assert len(found) == 3
    even = simulate([StageTimes(0.01, 0.02)] * 8, 64)
    for row, (devices, passes) in zip(found, [(0.01, 0.0), (0.0, 0.05), (0.01, 0.05)]):
        for cell, replicas in zip(row[1:3], (1, 16)):
            jitters = [Jitter(devices**2, passes**2, devices=8, replicas=replicas, seed=seed) for seed in range(8)]
            slower = np.mean([step_times(even, jitter, 1)[0] for jitter in jitters]) / even.duration_s - 1
            assert float(cell.split()[0]) == pytest.approx(100 * slower, abs=0.35)


def test_intervals_and_goodput() -> None:
    found = rows("Failures and goodput", 7)
    assert len(found) == 6
    for gpus, every, pause, young, daly, goodput, simulated in found:
        faults, saving = Faults(int(gpus.replace(",", "")) // 8), Saving(float(pause.split()[0]))
        arguments = saving.pause_s, faults.mtbf_s
        assert every == describe_time(faults.mtbf_s)
        assert (young, daly) == (f"{young_interval_s(*arguments):,.0f} s", f"{daly_interval_s(*arguments):,.0f} s")
        assert goodput == f"{expected_goodput(daly_interval_s(*arguments), saving, faults):.2%}".replace("%", " %")
        [one] = simulate_goodput([daly_interval_s(*arguments)], saving, faults, draws=400)
        assert simulated == f"{100 * one.share:.2f} ± {200 * one.error:.2f} %"


def test_spare_nodes() -> None:
    needed = spares_needed(Faults(2048))
    assert f"for a day need {needed}." in PAGE.replace("\n", " ")


def test_picture() -> None:
    assert (ROOT / "docs" / "images" / "goodput.png").read_bytes().startswith(b"\x89PNG")
