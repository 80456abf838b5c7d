"""Failures of nodes, what they cost, and how often to save: closed forms.

Failures are a Poisson process. A run that fails loses its steps since the last complete checkpoint, waits until the
failure is noticed, and restarts. Saving more often loses less and pauses more. The interval in between is Young's
(1974) or Daly's (2006); `best_interval_s` is the exact optimum for this model. `goodput` simulates the same model, and
what has no closed form: spare nodes that run out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from megatron_ds.errors import ConfigError

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S

MOST_EXPONENT = 700.0  # of numbers with double precision

LLAMA3_NODE_MTBF_HOURS = 54 * 24 * 2048 / 419
"""Llama 3 405B (arXiv 2407.21783): 419 unexpected interruptions in 54 days on 2,048 nodes of 8 H100."""

RSC1_NODE_MTBF_HOURS = 24 * 1000 / 6.5
"""RSC-1 (arXiv 2410.21680): 6.5 failures in 1,000 node-days, on nodes of 8 A100."""


@dataclass(frozen=True)
class Faults:
    """Rates of the interruptions of a run, and their length.

    Attributes:
        nodes: of the run; it needs all of them.
        node_mtbf_hours: mean time between failures of one node that interrupt the run.
        job_mtbf_hours: mean time between interruptions whose rate does not grow with the nodes, such as those by
            storage, the scheduler or people; infinite = none.
        detection_s: from a failure until it is noticed.
        restart_s: from there until training continues: processes, loading, compilation. It may fail too.
        spare_nodes: nodes that replace broken ones at once; None = always one more.
        repair_hours: until a broken node is a spare one.
        broken_share: share of interruptions after which a node must be repaired.

    Raises:
        ConfigError: a value is out of range.
    """

    nodes: int
    node_mtbf_hours: float = LLAMA3_NODE_MTBF_HOURS
    job_mtbf_hours: float = math.inf
    detection_s: float = 60.0
    restart_s: float = 300.0
    spare_nodes: int | None = None
    repair_hours: float = 24.0
    broken_share: float = 0.5

    def __post_init__(self) -> None:
        _check("faults", self, "nodes", "node_mtbf_hours", "job_mtbf_hours", above_zero=True)
        _check("faults", self, "detection_s", "restart_s", "spare_nodes", "repair_hours", "broken_share")
        if self.broken_share > 1:
            raise ConfigError(f"faults: broken_share={self.broken_share} must be at most 1; nearest: 1")

    @property
    def mtbf_s(self) -> float:
        """Mean seconds between interruptions of the run."""
        return HOUR_S / (self.nodes / self.node_mtbf_hours + 1 / self.job_mtbf_hours)

    @property
    def down_s(self) -> float:
        """Mean seconds from an interruption until training continues, if spare nodes never run out.

        A restart that is interrupted itself is noticed and begun again.
        """
        exponent = self.restart_s / self.mtbf_s
        again = math.expm1(exponent) if exponent < MOST_EXPONENT else math.inf
        return self.detection_s + again * (self.mtbf_s + self.detection_s)


@dataclass(frozen=True)
class Saving:
    """The cost of one checkpoint.

    Attributes:
        pause_s: seconds in which training stands still: all of a synchronous save, the copy to host memory of an
            asynchronous one.
        write_s: seconds after the pause until the checkpoint is complete. A failure in this time returns to the
            checkpoint before.

    Raises:
        ConfigError: a value is out of range.
    """

    pause_s: float
    write_s: float = 0.0

    def __post_init__(self) -> None:
        _check("saving", self, "pause_s", "write_s")

    def pause_at(self, interval_s: float) -> float:
        """Return the pause if the next save begins after so many seconds of training: one is written at a time."""
        return self.pause_s + max(self.write_s - interval_s, 0.0)


def young_interval_s(pause_s: float, mtbf_s: float) -> float:
    """Return seconds of training between saves by Young (1974): sqrt(2 pause mtbf)."""
    return math.sqrt(2 * pause_s * mtbf_s)


def daly_interval_s(pause_s: float, mtbf_s: float) -> float:
    """Return seconds of training between saves by Daly (2006), whose series has two terms more than Young's."""
    if pause_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = pause_s / (2 * mtbf_s)
    return math.sqrt(2 * pause_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - pause_s


def best_interval_s(pause_s: float, mtbf_s: float) -> float:
    """Return the seconds of training between saves that maximize `expected_goodput`.

    The derivative vanishes where 1 - exp(-(interval + pause) / mtbf) = interval / mtbf. Neither restarts nor the
    writing after a pause move the optimum.
    """
    low, high = 0.0, mtbf_s
    while high - low > 1e-13 * mtbf_s:
        middle = (low + high) / 2
        if -math.expm1(-(middle + pause_s) / mtbf_s) > middle / mtbf_s:
            low = middle
        else:
            high = middle
    return high


def expected_goodput(interval_s: float, saving: Saving, faults: Faults) -> float:
    """Return the share of time in training that is not repeated, in a long run whose spare nodes never run out.

    Between two interruptions a run works for an exponential time. It completes its n-th checkpoint after
    n (interval + pause) + write, so on average exp(-write / mtbf) / (exp((interval + pause) / mtbf) - 1) of them.
    """
    mtbf_s = faults.mtbf_s
    exponent = (interval_s + saving.pause_at(interval_s)) / mtbf_s
    if exponent > MOST_EXPONENT:
        return 0.0
    saves = math.exp(-saving.write_s / mtbf_s) / math.expm1(exponent)
    return interval_s * saves / (mtbf_s + faults.down_s)


def spares_needed(faults: Faults, risk: float = 0.001) -> int:
    """Return the spare nodes with which a failure finds none with a probability of at most `risk`.

    The number of nodes in repair is Poisson distributed with mean rate x repair time, whatever the distribution of
    repair times. A failure finds no spare if as many or more are in repair.
    """
    in_repair = faults.broken_share * faults.repair_hours * HOUR_S / faults.mtbf_s
    if in_repair > MOST_EXPONENT:
        return math.ceil(in_repair + NormalDist().inv_cdf(1 - risk) * math.sqrt(in_repair))
    spares, term, none = 0, math.exp(-in_repair), 1.0
    while none > risk:
        none -= term
        spares += 1
        term *= in_repair / spares
    return spares


def _check(section: str, values: object, *names: str, above_zero: bool = False) -> None:
    for name in names:
        value = getattr(values, name)
        if value is not None and not (value > 0 if above_zero else 0 <= value < math.inf):
            rule, near = ("above 0", "1") if above_zero else ("finite and at least 0", "0")
            raise ConfigError(f"{section}: {name}={value} must be {rule}; nearest: {near}")
