"""`python -m bench [CASE ...]`: run cases, show them, and write `results.json`, `RESULTS.md` and `results.png`."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.arena import Samples, compete
from bench.cases import CASES, Case, Entry
from bench.files import write_corpus
from bench.gemm import device_count, device_peak, flops_of_step
from bench.report import show, write
from bench.result import CaseResult, EntryResult, check_same_work, judge, machine
from bench.runs import merge
from bench.work import Spec, write_model

GEMM = "matrix products"
WIDTH = 120  # columns of tables that are not written to a terminal


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Cases to run; all by default.", metavar="CASE")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; each contestant has one turn per round.")] = 3,
    runs: Annotated[int, typer.Option(min=1, help="Number of runs of all cases, each with new processes.")] = 1,
    targets: Annotated[bool, typer.Option("--targets", help="Run only cases and contestants of targets.")] = False,
    alone: Annotated[bool, typer.Option(help="Measure the contestants of targets alone too.")] = True,
    output: Annotated[Path, typer.Option(help="Output directory.")] = Path("out/bench"),
    tiny: Annotated[bool, typer.Option("--tiny", help="Run with tiny models, to test the bench itself.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda if available.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the cases and exit.")] = False,
) -> None:
    """Compare this package with its alternatives, which alternate within one run.

    Example: python -m bench one tp2 --runs 5
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if listing:
        for name, case in CASES.items():
            console.print(f"{name:12} {case.title}: {'; '.join(case.entries)}", soft_wrap=True)
        return
    unknown = [name for name in names or () if name not in CASES]
    if unknown:
        raise typer.BadParameter(f"unknown case {unknown[0]}; cases: {', '.join(CASES)}")
    began_s = time.monotonic()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    device = device or _device()
    output.mkdir(parents=True, exist_ok=True)
    where = {"date": datetime.date.today().isoformat(), **machine(device), "rounds of a run": str(rounds)}
    wanted = [name for name in names or CASES if CASES[name].targets or not targets]
    results: list[CaseResult] = []
    for number in range(runs):
        for name in wanted:
            case = CASES[name].only_targets() if targets else CASES[name]
            result = run_case(name, case, rounds, device, tiny, alone)
            results = merge([*results, result])
            show(result, console)
            write(results, {**where, "runs": str(number + 1)}, output)  # keeps the results if the next case fails
    took = f"{time.monotonic() - began_s:.0f} s; {output}/RESULTS.md, results.json, results.png"
    console.print(took, soft_wrap=True)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run_case(name: str, case: Case, rounds: int, device: str, tiny: bool = False, alone: bool = True) -> CaseResult:
    """Write the inputs of the contestants, run them in turns, those of targets alone too, and evaluate the targets."""
    work = case.work.shrunk() if tiny else case.work
    if device == "cuda":
        work = replace(work, dtype="bf16")
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        place = Path(made)
        folder = place / "given"
        folder.mkdir()
        flops = 0.0
        if work.size_bytes:
            amount = float(write_corpus(work.size_bytes, folder))
        else:
            flops = write_model(work, folder)
            amount = float(work.tokens)
        if case.unit == "GB/s":
            flops, amount = 0.0, sum(file.stat().st_size for file in folder.iterdir()) / 1e9
        ranks = device_count(device)
        entries = {
            label: entry
            for label, entry in case.entries.items()
            if entry.device in (None, device) and (ranks is None or entry.world <= ranks)
        }
        entries |= {GEMM: Entry("gemm")} if flops else {}
        specs = {
            label: Spec(entry.runner, entry.world, _options(entry), work, str(folder), device, entry.environment)
            for label, entry in entries.items()
        }
        samples = compete(specs, rounds, case.steps, place)
        compared = [label for label in specs if alone and label in case.compared]
        by_itself = {label: compete({label: specs[label]}, rounds, case.steps, place)[label] for label in compared}
    limits = _limits(samples.pop(GEMM), device) if flops else {}
    found = tuple(_entry(label, entries[label].world, one) for label, one in samples.items())
    lone = {label: _entry(f"{label}, alone", entries[label].world, one) for label, one in by_itself.items()}
    check_same_work([*found, *lone.values()], work.dtype)
    found = tuple(replace(one, alone_seconds=lone[one.label].seconds) if one.label in lone else one for one in found)
    shared = device == "cpu"
    result = CaseResult(name, case.title, case.unit, amount, flops, limits, found, (), case.note, shared)
    return replace(result, targets=judge(result, case.targets))


def _entry(label: str, world: int, samples: Samples) -> EntryResult:
    seconds, losses = tuple(samples.seconds), samples.losses
    return EntryResult(label, world, seconds, samples.peak_bytes or 0, losses[0], losses[-1])


def _options(entry: Entry) -> Mapping[str, object]:
    return {**entry.options, "workers": len(os.sched_getaffinity(0))}


def _limits(gemm: Samples, device: str) -> dict[str, float]:
    limits = {"the limit": flops_of_step(device) / gemm.median_s}
    peak = device_peak(device)
    return {**limits, "the device's peak (MFU)": peak} if peak is not None else limits


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
