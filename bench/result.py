"""Results of a case and of a bench run."""

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
        seconds: duration of a step, one per round.
        peak_bytes: peak memory of the largest process.
        loss: loss of the first step, over all ranks.
        last_loss: loss of the last step; if they agree, the contestants of a case do the same work.
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
    """A target and the measured ratio."""

    target: Target
    ratio: float

    @property
    def met(self) -> bool:
        bound = self.target.bound
        return self.ratio >= bound if self.target.figure == "speed" else self.ratio <= bound

    @property
    def summary(self) -> str:
        target, speed = self.target, self.target.figure == "speed"
        return (
            f"{target.ours} / {target.other}, {target.figure}: {self.ratio:.2f}, target "
            f"{'at least' if speed else 'at most'} {target.bound:.3g}{'' if self.met else ' - MISSED'}"
        )


@dataclass(frozen=True)
class CaseResult:
    """One case.

    Attributes:
        name, title, unit: see `cases`.
        amount: work of a step, in the unit times seconds.
        flops: FLOPs of a step, forward and backward, without recomputation; 0 if nothing is trained.
        limit_flops: FLOP/s of plain matrix products in the same run, and of the data sheet if known.
        entries: contestants, the reference first.
        targets: targets and their ratios.
        note: a remark for the reader.
        ranks_share: True if all ranks share the limit (the cores of a CPU), False if it is that of each rank's GPU.
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

    def fractions_of_limits(self, entry: EntryResult) -> list[float]:
        """Return the fraction of each limit that a contestant reaches."""
        devices = 1 if self.ranks_share else entry.world
        return [self.flops / entry.median_s / (limit * devices) for limit in self.limit_flops.values()]

    def speed(self, entry: EntryResult) -> float:
        return self.amount / entry.median_s

    def range(self, entry: EntryResult) -> tuple[float, float]:
        """Return the speed of the slowest and of the fastest round."""
        return self.amount / max(entry.seconds), self.amount / min(entry.seconds)


SAME_LOSS = {"fp32": (1e-4, 1e-3), "bf16": (1e-2, 2e-2)}  # relative, of the first step and of the last


def check_same_work(entries: Sequence[EntryResult], dtype: str = "fp32") -> None:
    """Check that all contestants started and ended with the same loss, on a batch that they memorized meanwhile.

    Raises:
        ValueError: the loss of a contestant differs from the first one's.
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
    """Return the median of the ratios within each round, whose contestants share the same disturbances."""
    entries = {entry.label: entry for entry in case.entries}
    judged = []
    for target in targets:
        if not {target.ours, target.other} <= set(entries):
            continue  # one of them does not run on this device
        ours, other = entries[target.ours], entries[target.other]
        if target.figure == "memory":
            ratio = ours.peak_bytes / other.peak_bytes
        else:
            ratio = statistics.median(theirs / mine for mine, theirs in zip(ours.seconds, other.seconds))
        judged.append(TargetResult(target, ratio))
    return tuple(judged)


def machine(device: str) -> dict[str, str]:
    """Describe the machine and the versions."""
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
    """Write all results as JSON."""
    path.write_text(json.dumps({**where, "cases": [asdict(result) for result in results]}, indent=1) + "\n")
