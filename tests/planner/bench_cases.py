"""The bench's cases as the planner predicts them: `python -m tests.planner.bench_cases ONE.yaml TWO.yaml [CASE ...]`.

ONE and TWO are calibrations of this machine with one and two ranks, by `megatron-ds plan --calibrate`. Predicted
seconds of a step stand beside those of bench/results.json, which were measured on a machine without other load.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from bench.cases import CASES, Entry
from bench.ours import engine_fields
from bench.work import MASK_EVERY, MASKED_MODELS, Spec, Work
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.step_time import StepTime, plan_time
from tests.planner.inputs import input_of

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


def measured() -> dict[tuple[str, str], float]:
    """Return the recorded seconds of steps, medians, alone on the machine where that was measured."""
    found = json.loads(RESULTS.read_text())["cases"]
    return {
        (case["name"], one["label"]): median(one["alone_seconds"] or one["seconds"])
        for case in found
        for one in case["entries"]
    }


def main(profiles: Mapping[int, Device], names: Sequence[str]) -> None:
    """Print the table."""
    recorded, errors = measured(), []
    for name, label, work, entry in predicted_cases():
        if names and name not in names:
            continue
        found, seconds = predict(work, entry, profiles), recorded[name, label]
        error = found.total_s / seconds - 1
        errors.append(abs(error))
        parts = ", ".join(f"{part} {value:.2f}" for part, value in found.parts.items())
        print(f"| {name} | {label} | {found.total_s:.2f} | {seconds:.2f} | {error:+.0%} | {parts} |", flush=True)
    near = sum(error <= 0.15 for error in errors)
    print(f"{len(errors)} cases, {near} within 15 %, median {median(errors):.1%}")


if __name__ == "__main__":
    main({1: find_device(sys.argv[1]), 2: find_device(sys.argv[2])}, sys.argv[3:])
