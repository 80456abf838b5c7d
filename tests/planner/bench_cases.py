"""The bench's cases as the planner predicts them: `python -m tests.planner.bench_cases [DIR [CASE ...]]`.

With DIR, this machine is calibrated and the cases are measured on it, which takes about half an hour; nothing else
should run. DIR keeps the profiles and the measured seconds. The speed of a shared machine changes by the minute: a
product of the calibration is timed again before and after each case, and the last column has the error with the plan at
that speed. Called again, it measures what is missing, and again what the machine was slow at.

Without it the shipped profile `cpu` is used, its speed scaled by one number for each number of ranks, so that the
first case is right. Predicted seconds of a step stand beside those of bench/results.json.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median, quantiles

import torch

from bench.arena import compete
from bench.cases import CASES, Entry
from bench.ours import engine_fields
from bench.work import MASK_EVERY, MASKED_MODELS, Spec, Work, write_model
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.planner.calibration import measure_operations
from megatron_ds.planner.input_of_config import input_of
from megatron_ds.planner.operations import Product
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.timing.step_time import StepTime, plan_time

SLOWNESS, MOST_SLOWNESS = ", slowness", 1.05
"""Suffix of a case's key, and the time of a product around it, relative to its calibrated time, that is slow."""
MEASURED_STEPS, MEASURED_LONG_STEPS, LONG = 5, 3, 8192
"""Steps that are measured of a case, and of one with sequences of `LONG` tokens or more."""
RESULTS = Path(__file__).parents[2] / "bench" / "results.json"


def predicted_cases() -> Iterator[tuple[str, str, Work, Entry]]:
    """Yield names of cases and of this package's entries that train, with their work."""
    for name, case in CASES.items():
        for label, entry in case.entries.items():
            if entry.runner == "ours" and not entry.options.get("compile"):
                yield name, label, case.work, entry


def plan_input(work: Work, entry: Entry) -> PlanInput:
    """Return the input of a plan of an entry."""
    masked = work.model["model_type"] in MASKED_MODELS
    columns = ("input_ids", "decoder_input_ids", "targets") if work.target_length else ("input_ids", "targets")
    rows = Rows(work.seq_length, work.target_length or None, columns, 1 / MASK_EVERY if masked else 1.0)
    spec = Spec(entry.runner, entry.world, entry.options, work, "", "cpu")
    return input_of(work.model, engine_fields(spec), rows, Machines(1, entry.world, "cpu"))


def predict(work: Work, entry: Entry, profiles: Mapping[int, Device]) -> StepTime:
    """Return the planner's prediction of a step."""
    device = profiles[entry.world]
    return plan_time(plan_input(work, entry), device, find_network(None, device, entry.world))


OUTDATED = {("context8k", "ours, gather")}
"""Entries that were recorded with code whose steps were longer: before attention in tiles of queries."""


def measured() -> dict[tuple[str, str], float]:
    """Return the recorded seconds of steps, medians, alone on the machine where that was measured."""
    found = json.loads(RESULTS.read_text())["cases"]
    return {
        (case["name"], one["label"]): median(one["alone_seconds"] or one["seconds"])
        for case in found
        for one in case["entries"]
        if (case["name"], one["label"]) not in OUTDATED
    }


def measure_here(
    file: Path, profiles: Mapping[int, Device], names: Sequence[str] = ()
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], float]]:
    """Return the seconds of steps on this machine, each case alone, and how slow it was then.

    Seconds are the lower quartile, as in a calibration: what the machine does besides makes steps longer, never
    shorter.

    Args:
        file: JSON with cases that are measured already. The others are added, and those that were measured while the
            machine was slower than `MOST_SLOWNESS` are measured again; the try counts in which it was fastest.
        profiles: number of ranks -> profile of this machine, whose speed counts as 1.
        names: of cases; empty = all.
    """
    known: dict[str, list[float]] = json.loads(file.read_text()) if file.is_file() else {}
    for name, label, work, entry in predicted_cases():
        key = f"{name}: {label}"
        best = mean(known.get(key + SLOWNESS, [math.inf]))
        if best > MOST_SLOWNESS and (not names or name in names):
            before = slowness(profiles[entry.world], entry.world)
            seconds = _steps(label, work, entry)
            around = [before, slowness(profiles[entry.world], entry.world)]
            if mean(around) < best:
                known.update({key: seconds, key + SLOWNESS: around})
            file.write_text(json.dumps(known, indent=1))
    found = {(name, label): f"{name}: {label}" for name, label, _, _ in predicted_cases()}
    found = {one: key for one, key in found.items() if key in known}
    seconds = {one: quantiles(known[key], n=4)[0] for one, key in found.items()}
    return seconds, {one: mean(known.get(key + SLOWNESS, [1.0])) for one, key in found.items()}


def slowness(profile: Device, ranks: int) -> float:
    """Return the time of a product on all ranks at once, relative to that of a profile of this machine."""
    row = max(profile.measured_products, key=lambda one: one.m * one.n * one.k * one.batch)
    product = Product(row.m, row.n, row.k, row.batch, row.dtype)
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return mean(run_local(partial(_product_us, product=product, threads=threads), ranks, 60.0)) / row.us


def _product_us(info: RankInfo, product: Product, threads: int) -> float:
    torch.set_num_threads(threads)
    (times_s,) = measure_operations.time_in_rounds([product], torch.device("cpu"), rounds=9)
    return 1e6 * measure_operations.undisturbed(times_s)


def _steps(label: str, work: Work, entry: Entry) -> list[float]:
    """Return the seconds of single steps of an entry."""
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        folder = Path(made) / "given"
        folder.mkdir()
        run_local(lambda _: write_model(work, folder), 1, 600.0)  # its threads must not be in this process, which forks
        options = {**entry.options, "workers": len(os.sched_getaffinity(0))}
        spec = Spec(entry.runner, entry.world, options, work, str(folder), "cpu", entry.environment)
        rounds = MEASURED_STEPS if work.seq_length < LONG else MEASURED_LONG_STEPS
        return compete({label: spec}, rounds, 1, Path(made))[label].seconds


def profiles_here(directory: Path) -> dict[int, Device]:
    """Return the profiles of this machine with one and two ranks, from a directory, or measured and written there."""
    found = {}
    for ranks in (1, 2):
        path = directory / f"{ranks}.yaml"
        if not path.is_file():
            command = [sys.executable, "-m", "megatron_ds", "plan", "--calibrate", str(path)]
            subprocess.run([*command, "--gpus-per-node", str(ranks)], check=True, timeout=900)
        found[ranks] = find_device(str(path))
    return found


@dataclass(frozen=True)
class Compared:
    """A case, predicted and measured: name, label of the entry, ranks, and seconds of a step."""

    case: str
    label: str
    ranks: int
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_s / self.measured_s - 1


def compared(
    profiles: Mapping[int, Device], recorded: Mapping[tuple[str, str], float], names: Sequence[str] = ()
) -> list[Compared]:
    """Return the measured cases, or some of them.

    Args:
        profiles: number of ranks -> profile.
        recorded: (case, label) -> seconds.
        names: of cases; empty = all.
    """
    return [
        Compared(name, label, entry.world, predict(work, entry, profiles).total_s, recorded[name, label])
        for name, label, work, entry in predicted_cases()
        if (name, label) in recorded and (not names or name in names)
    ]


def scaled(found: Sequence[Compared]) -> list[Compared]:
    """Return the cases with the predictions of each number of ranks scaled so that the first of them is right."""
    first = {one.ranks: one for one in reversed(found)}
    return [replace(one, predicted_s=one.predicted_s / (first[one.ranks].error + 1)) for one in found]


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    slow: Mapping[tuple[str, str], float] = {}
    if arguments:
        directory = Path(arguments[0])
        directory.mkdir(parents=True, exist_ok=True)
        profiles = profiles_here(directory)
        seconds, slow = measure_here(directory / "seconds.json", profiles, arguments[1:])
        found = compared(profiles, seconds)
    else:
        found = scaled(compared({1: find_device("cpu"), 2: find_device("cpu")}, measured()))
    print("| case | entry | ranks | predicted s | measured s | error | slowness | error at that speed |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    at_speed = []
    for one in found:
        slower = slow.get((one.case, one.label), 1.0)
        at_speed.append((1 + one.error) * slower - 1)
        times = f"{one.predicted_s:.2f} | {one.measured_s:.2f} | {one.error:+.0%} | {slower:.2f} | {at_speed[-1]:+.0%}"
        print(f"| {one.case} | {one.label} | {one.ranks} | {times} |")
    for name, errors in ("", [one.error for one in found]), (" at the machine's speed then", at_speed):
        off = [abs(error) for error in errors]
        print(f"\n{len(off)} entries: median error{name} {median(off):.1%}, {sum(e <= 0.15 for e in off)} within 15 %")


if __name__ == "__main__":
    main(sys.argv[1:])
