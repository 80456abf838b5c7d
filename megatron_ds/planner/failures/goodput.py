"""Simulation of runs with failures: the seconds of a month by what they were spent on.

Each draw is one run. All draws and all intervals between saves are simulated at once, event by event: a restart, the
training up to the next failure with its saves, the time until the failure is noticed, and the wait for a node. Every
interval sees the same failures, so that curves over intervals are smooth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_ds.errors import ConfigError
from megatron_ds.planner.failures.closed_forms import DAY_S, HOUR_S, Faults, Saving

Array = np.ndarray
USES = ("useful", "saving", "lost", "detection", "waiting", "restart")
"""Uses of time: training that counts, pauses of saves, training that is repeated, failures that are not yet noticed,
waiting for a spare node, and restarts."""


@dataclass(frozen=True)
class Goodput:
    """Shares of time at one interval between saves, the means of many simulated runs.

    Attributes:
        interval_s: seconds of training between saves.
        shares: by use, in the order of `USES`; their sum is 1.
        error: standard error of the share of useful time.
        failures: mean number of failures of a run.
    """

    interval_s: float
    shares: dict[str, float]
    error: float
    failures: float

    @property
    def share(self) -> float:
        """Share of useful time."""
        return self.shares["useful"]


class Span(NamedTuple):
    """Part of a run.

    Attributes:
        use: one of `USES`; "useful" and "lost" spans contain their saves.
        start_s, end_s: seconds since the begin of the run.
    """

    use: str
    start_s: float
    end_s: float


class _Cycle(NamedTuple):
    """One restart, and the training until a failure is noticed; arrays of (intervals, draws)."""

    start_s: Array
    seconds: dict[str, Array]
    failed: Array


def simulate_goodput(
    intervals_s: Sequence[float], saving: Saving, faults: Faults, *, days: float = 30.0, draws: int = 100, seed: int = 0
) -> list[Goodput]:
    """Return the shares of time at each interval.

    Args:
        intervals_s: seconds of training between saves.
        saving, faults: costs and rates.
        days: length of a run.
        draws: number of runs.
        seed: of the random numbers.

    Raises:
        ConfigError: an interval is not above 0.
    """
    if not min(intervals_s) > 0:
        raise ConfigError(f"a save every {min(intervals_s):g} s of training is impossible; nearest: 1 s")
    shape = (len(intervals_s), draws)
    totals = {use: np.zeros(shape) for use in USES}
    failures = np.zeros(shape)
    for cycle in _cycles(np.asarray(intervals_s, np.float64)[:, None], saving, faults, days * DAY_S, draws, seed):
        for use, seconds in cycle.seconds.items():
            totals[use] += seconds
        failures += cycle.failed
    shares = {use: seconds / (days * DAY_S) for use, seconds in totals.items()}
    errors = shares["useful"].std(axis=1, ddof=min(1, draws - 1)) / math.sqrt(draws)
    return [
        Goodput(
            interval_s=float(interval),
            shares={use: float(values[row].mean()) for use, values in shares.items()},
            error=float(errors[row]),
            failures=float(failures[row].mean()),
        )
        for row, interval in enumerate(intervals_s)
    ]


def simulate_run(interval_s: float, saving: Saving, faults: Faults, *, days: float = 30.0, seed: int = 0) -> list[Span]:
    """Return one run as spans of time, one after another."""
    spans = []
    for cycle in _cycles(np.array([[interval_s]]), saving, faults, days * DAY_S, 1, seed):
        now = cycle.start_s.item()
        seconds = {use: values.item() for use, values in cycle.seconds.items()}
        trained = seconds["useful"] + seconds["saving"] + seconds["lost"]
        kept = min(trained, seconds["useful"] * (1 + saving.pause_at(interval_s) / interval_s))
        parts = [
            ("waiting", seconds["waiting"]),
            ("restart", seconds["restart"]),
            ("useful", kept),
            ("lost", trained - kept),
            ("detection", seconds["detection"]),
        ]
        for use, length in parts:
            if length > 0:
                spans.append(Span(use, now, now + length))
            now += length
    return spans


def _cycles(
    intervals_s: Array, saving: Saving, faults: Faults, end_s: float, draws: int, seed: int
) -> Iterator[_Cycle]:
    random = np.random.default_rng(seed)
    now = np.zeros((len(intervals_s), draws))
    waiting = np.zeros_like(now)
    repaired = np.zeros((*now.shape, faults.spare_nodes or 0))  # when each spare node is ready
    while (now < end_s).any():
        until_failure = random.exponential(faults.mtbf_s, draws)
        start = now
        left = np.maximum(end_s - start, 0.0)
        waited = np.minimum(waiting, left)
        up = np.minimum(until_failure, left - waited)
        failed = (until_failure < left - waited) & (left > 0)
        restart = np.minimum(up, faults.restart_s)
        seconds = _training(up - restart, failed, intervals_s, saving)
        detection = np.where(failed, np.minimum(faults.detection_s, left - waited - up), 0.0)
        seconds.update(waiting=waited, restart=restart, detection=detection)
        yield _Cycle(start, seconds, failed)
        now = start + waited + up + detection
        broken = random.random(draws) < faults.broken_share
        waiting = _wait(repaired, now, failed & broken, faults)


def _training(trained: Array, failed: Array, intervals_s: Array, saving: Saving) -> dict[str, Array]:
    """Divide seconds of training, which end by a failure or with the run, into useful ones, saves and lost ones."""
    pause = np.vectorize(saving.pause_at)(intervals_s)
    period = intervals_s + pause
    saves = np.floor(trained / period)
    rest = trained - saves * period
    paused = saves * pause + np.maximum(rest - intervals_s, 0.0)
    complete = np.maximum(np.floor((trained - saving.write_s) / period), 0.0)
    useful = np.where(failed, complete * intervals_s, trained - paused)
    return {"useful": useful, "saving": paused, "lost": trained - paused - useful}


def _wait(repaired: Array, now: Array, broken: Array, faults: Faults) -> Array:
    """Return seconds until each run has a node instead of a broken one; replaces the times in `repaired`."""
    if faults.spare_nodes is None:
        return np.zeros_like(now)
    back = now + faults.repair_hours * HOUR_S
    if not faults.spare_nodes:
        return np.where(broken, back - now, 0.0)
    first = repaired.argmin(axis=-1)[..., None]
    ready = np.take_along_axis(repaired, first, axis=-1)[..., 0]
    swapped = broken & (ready < back)
    np.put_along_axis(repaired, first, np.where(swapped, back, ready)[..., None], axis=-1)
    return np.where(broken, np.maximum(np.minimum(ready, back) - now, 0.0), 0.0)
