"""What came of a case, and of the whole run."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from bench.cases import Target

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy")


@dataclass(frozen=True)
class EntryResult:
    """One contestant of a case.

    Attributes:
        label: its name.
        world: ranks.
        seconds: of a step, a round each.
        peak_bytes: of the process that held most.
        loss: of the first step, over all ranks.
        last_loss: of the last; contestants of a case do the same work if theirs agree.
    """

    label: str
    world: int
    seconds: tuple[float, ...]
    peak_bytes: int
    loss: float
    last_loss: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class TargetResult:
    """A target and the ratio that was seen."""

    target: Target
    ratio: float

    @property
    def met(self) -> bool:
        bound = self.target.bound
        return self.ratio >= bound if self.target.figure == "speed" else self.ratio <= bound

    @property
    def words(self) -> str:
        target, speed = self.target, self.target.figure == "speed"
        return (
            f"{target.ours} / {target.other}, {target.figure}: {self.ratio:.2f}, hoped for "
            f"{'at least' if speed else 'at most'} {target.bound:.3g}{'' if self.met else ' - MISSED'}"
        )


@dataclass(frozen=True)
class CaseResult:
    """One case.

    Attributes:
        name, title, unit: see `cases`.
        amount: what a step does, in the unit times seconds.
        flops: of a step, forward and backward, recomputation left out; 0 where nothing is trained.
        limit_flops: a second, of plain matrix products in the same run, and of the maker's data sheet where known.
        entries: contestants, the first one first.
        targets: what was hoped for.
        note: what a reader should know.
        ranks_share: whether the limit is that of all ranks together, the cores of a CPU, or of each one's GPU.
    """

    name: str
    title: str
    unit: str
    amount: float
    flops: float
    limit_flops: dict[str, float]
    entries: tuple[EntryResult, ...]
    targets: tuple[TargetResult, ...]
    note: str = ""
    ranks_share: bool = True

    def shares_of_limits(self, entry: EntryResult) -> list[float]:
        """How much of each limit a contestant reaches."""
        devices = 1 if self.ranks_share else entry.world
        return [self.flops / entry.median_s / (limit * devices) for limit in self.limit_flops.values()]

    def speed(self, entry: EntryResult) -> float:
        return self.amount / entry.median_s

    def range(self, entry: EntryResult) -> tuple[float, float]:
        """The slowest and the fastest round."""
        return self.amount / max(entry.seconds), self.amount / min(entry.seconds)


SAME_LOSS = {"fp32": (1e-4, 1e-3), "bf16": (1e-2, 2e-2)}  # relative, of the first step and of the last


def check_same_work(entries: Sequence[EntryResult], dtype: str = "fp32") -> None:
    """Whether all began and ended with the same loss, on a batch that they learned by heart meanwhile.

    Raises:
        ValueError: one of them does something else.
    """
    first = entries[0]
    at_first, at_last = SAME_LOSS[dtype]
    for entry in entries:
        if abs(entry.loss - first.loss) > at_first * abs(first.loss):
            raise ValueError(f"{entry.label} began with loss {entry.loss:g}, {first.label} with {first.loss:g}")
        if abs(entry.last_loss - first.last_loss) > at_last * abs(first.last_loss):
            raise ValueError(
                f"{entry.label} ended with loss {entry.last_loss:g}, {first.label} with {first.last_loss:g}"
            )


def judge(case: CaseResult, targets: tuple[Target, ...]) -> tuple[TargetResult, ...]:
    """Ratios round by round, and their median: rounds share what disturbs them."""
    entries = {entry.label: entry for entry in case.entries}
    judged = []
    for target in targets:
        if not {target.ours, target.other} <= set(entries):
            continue  # one of them takes no part on this device
        ours, other = entries[target.ours], entries[target.other]
        if target.figure == "memory":
            ratio = ours.peak_bytes / other.peak_bytes
        else:
            ratio = statistics.median(theirs / mine for mine, theirs in zip(ours.seconds, other.seconds))
        judged.append(TargetResult(target, ratio))
    return tuple(judged)


def machine(device: str) -> dict[str, str]:
    """Where this runs, for whoever compares."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {cores} cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    return {**found, "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES)}


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def write_json(results: list[CaseResult], where: dict[str, str], path: Path) -> None:
    """Everything, for programs."""
    path.write_text(json.dumps({**where, "cases": [asdict(result) for result in results]}, indent=1) + "\n")
