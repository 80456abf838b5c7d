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
        seconds: duration of a step, one per round of every run, in turns with the others.
        peak_bytes: peak memory of the largest process.
        loss: loss of the first step, over all ranks.
        last_loss: loss of the last step; if they agree, the contestants of a case do the same work.
        alone_seconds: the same durations while no other contestant exists; empty if it takes part in no target.
    """

    label: str
    world: int
    seconds: tuple[float, ...]
    peak_bytes: int
    loss: float
    last_loss: float
    alone_seconds: tuple[float, ...] = ()

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class TargetResult:
    """A target and the measured ratios.

    Attributes:
        target: the target.
        in_turns: the ratio of each run, measured in turns.
        alone: the ratio of each run, each contestant alone on the machine; empty if that was not measured.
    """

    target: Target
    in_turns: tuple[float, ...]
    alone: tuple[float, ...] = ()

    @property
    def ratio(self) -> float:
        """The median over runs, in the worse of both ways."""
        medians = [statistics.median(ratios) for ratios in (self.in_turns, self.alone) if ratios]
        return min(medians) if self.target.figure == "speed" else max(medians)

    @property
    def met(self) -> bool:
        bound = self.target.bound
        return self.ratio >= bound if self.target.figure == "speed" else self.ratio <= bound

    @property
    def bound(self) -> str:
        return f"{'at least' if self.target.figure == 'speed' else 'at most'} {self.target.bound:.3g}"

    @property
    def summary(self) -> str:
        ways = f"{_over_runs(self.in_turns)} in turns, {_over_runs(self.alone)} alone" if self.alone else ""
        return (
            f"{self.target.ours} / {self.target.other}, {self.target.figure}: {ways or _over_runs(self.in_turns)}, "
            f"target {self.bound}{'' if self.met else ' - MISSED'}"
        )

    def cells(self) -> list[str]:
        """Return what is compared, the target, both ratios with their range over runs, and the verdict."""
        compared = f"{self.target.ours} / {self.target.other}, {self.target.figure}"
        ways = [_over_runs(ratios) if ratios else "" for ratios in (self.in_turns, self.alone)]
        return [compared, self.bound, *ways, "met" if self.met else "MISSED"]


def _over_runs(ratios: Sequence[float]) -> str:
    """Format the median over runs, and their range if there are several."""
    middle = f"{statistics.median(ratios):.2f}"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f} to {max(ratios):.2f})"


@dataclass(frozen=True)
class CaseResult:
    """One case, of one run or of several.

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

    @property
    def has_alone(self) -> bool:
        """True if contestants were measured alone too."""
        return any(entry.alone_seconds for entry in self.entries)

    def speed(self, entry: EntryResult) -> float:
        return self.amount / entry.median_s

    def speeds(self, seconds: Sequence[float]) -> tuple[float, float, float]:
        """Return the median speed, and those of the slowest and of the fastest round."""
        return self.amount / statistics.median(seconds), self.amount / max(seconds), self.amount / min(seconds)


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
    """Return the ratios of one run.

    In turns, it is the median of the ratios within each round, whose contestants share the same disturbances; alone,
    the ratio of the medians.
    """
    entries = {entry.label: entry for entry in case.entries}
    judged = []
    for target in targets:
        if not {target.ours, target.other} <= set(entries):
            continue  # one of them does not run on this device
        ours, other = entries[target.ours], entries[target.other]
        if target.figure == "memory":
            judged.append(TargetResult(target, (ours.peak_bytes / other.peak_bytes,)))
            continue
        ratio = statistics.median(theirs / mine for mine, theirs in zip(ours.seconds, other.seconds))
        alone: tuple[float, ...] = ()
        if ours.alone_seconds and other.alone_seconds:
            alone = (statistics.median(other.alone_seconds) / statistics.median(ours.alone_seconds),)
        judged.append(TargetResult(target, (ratio,), alone))
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
