"""The plan of a run's failures: how often to save, what failures then cost, and how many spare nodes it needs.

The cost of a save is measured (a run logs for each how long it paused and wrote), or estimated from the checkpoint's
bytes. The costs of failures come from `planner.failures.goodput`, a simulation of many runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ds.planner.failures.closed_forms import (
    DAY_S,
    HOUR_S,
    Faults,
    Saving,
    best_interval_s,
    daly_interval_s,
    expected_goodput,
    spares_needed,
    young_interval_s,
)
from megatron_ds.planner.failures.goodput import Goodput, simulate_goodput
from megatron_ds.planner.plan_values import percent, strict
from megatron_ds.planner.profiles.link import GB

MONTH_DAYS, SHORTEST_DAYS = 30.0, 1.0
MOST_FAILURES = 3000
"""Failures of a simulated run; runs with more of them in a month are simulated for a shorter time."""
FACTORS = (0.25, 0.5, 2.0, 4.0)
"""Other intervals that a plan shows, as multiples of the best one."""

LEAST_PAUSE_S = 1.0
"""For ranks to agree and to begin their copies; an assumption."""

NODE_WRITE_BYTES_S = 1.2e9
"""To shared storage, from one node: BLOOM wrote 2.3 TB from 48 nodes in 40 s."""

TOTAL_WRITE_BYTES_S = 2e12
"""To shared storage, from all nodes: the sustainable throughput of Llama 3's storage of 240 PB on 7,500 servers, whose
peak is 7 TB/s (arXiv 2407.21783)."""

TOLERANCE = 0.001
"""Goodput that an advised interval may lose: fewer saves are less load on the storage, and the optimum is flat."""


@dataclass(frozen=True)
class FaultPlan:
    """Failures of a run.

    Attributes:
        days: length of the simulated runs, a month unless they fail all the time.
        faults, saving: rates and costs.
        step_s: seconds of a step, without pauses of saves.
        interval_steps: steps between two saves.
        advised_steps: most steps between two saves whose goodput is within 0.1 % of the highest.
        chosen, advised: goodput of the two.
        others: goodput at other intervals, in order.
        spare_nodes: nodes with which one in a thousand failures finds no spare one.
    """

    days: float
    faults: Faults
    saving: Saving
    step_s: float
    interval_steps: int
    advised_steps: int
    chosen: Goodput
    advised: Goodput
    others: tuple[Goodput, ...]
    spare_nodes: int

    @property
    def slowdown(self) -> float:
        """Seconds of a run with failures and saves, divided by those without; infinite if it makes no progress."""
        return 1 / self.chosen.share if self.chosen.share else math.inf

    def steps(self, goodput: Goodput) -> int:
        """Return the steps between two saves."""
        return round(goodput.interval_s / self.step_s)


def estimate_saving(rank_bytes: float, total_bytes: float, nodes: int, asynchronous: bool, copy_gb_s: float) -> Saving:
    """Estimate the cost of a checkpoint.

    Args:
        rank_bytes: that one rank saves.
        total_bytes: that all ranks save.
        nodes: that write them.
        asynchronous: training continues while files are written.
        copy_gb_s: 10^9 bytes per second from a device to its host's memory; see `Device.host_gb_s`.
    """
    copy_s = max(rank_bytes / (copy_gb_s * GB), LEAST_PAUSE_S)
    write_s = total_bytes / min(nodes * NODE_WRITE_BYTES_S, TOTAL_WRITE_BYTES_S)
    return Saving(copy_s, write_s) if asynchronous else Saving(copy_s + write_s)


def plan_faults(
    faults: Faults,
    saving: Saving,
    step_s: float,
    interval_steps: int | None = None,
    *,
    seed: int = 0,
) -> FaultPlan:
    """Plan the failures of a month.

    Args:
        faults: rates and costs of failures.
        saving: cost of a save.
        step_s: seconds of a step, without pauses of saves.
        interval_steps: steps between two saves, of the run file; None or 0 = the advised ones.
        seed: of the simulation.
    """
    least = math.ceil(max(saving.write_s, 1.0) / step_s)
    advised_steps = max(int(longest_interval_s(saving, faults) / step_s), least)
    chosen_steps = interval_steps or advised_steps
    others = sorted({max(round(advised_steps * factor), least) for factor in FACTORS} - {advised_steps})
    days = min(MONTH_DAYS, max(SHORTEST_DAYS, MOST_FAILURES * faults.mtbf_s / DAY_S))
    found = simulate_goodput(
        [steps * step_s for steps in (chosen_steps, advised_steps, *others)],
        saving,
        faults,
        days=days,
        seed=seed,
    )
    return FaultPlan(
        days=days,
        faults=faults,
        saving=saving,
        step_s=step_s,
        interval_steps=chosen_steps,
        advised_steps=advised_steps,
        chosen=found[0],
        advised=found[1],
        others=tuple(found[2:]),
        spare_nodes=spares_needed(faults),
    )


def longest_interval_s(saving: Saving, faults: Faults, tolerance: float = TOLERANCE) -> float:
    """Return the longest seconds of training between saves whose goodput is within `tolerance` of the highest."""
    shortest = max(saving.write_s, 1.0)
    low = max(best_interval_s(saving.pause_s, faults.mtbf_s), shortest)
    enough = expected_goodput(low, saving, faults) - tolerance
    if enough <= 0:
        return low
    high = 2 * low
    while expected_goodput(high, saving, faults) > enough:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if expected_goodput(middle, saving, faults) > enough else (low, middle)
    return low


def fault_facts(plan: FaultPlan) -> dict[str, Any]:
    """Return all numbers of a plan as plain data, for JSON; infinite ones are None."""
    faults, saving = plan.faults, plan.saving
    facts: dict[str, Any] = {
        "rates": asdict(faults),
        "mtbf_s": faults.mtbf_s,
        "saving": asdict(saving),
        "step_s": plan.step_s,
        "young_s": young_interval_s(saving.pause_s, faults.mtbf_s),
        "daly_s": daly_interval_s(saving.pause_s, faults.mtbf_s),
        "days": plan.days,
        "chosen": _goodput(plan, plan.chosen),
        "advised": _goodput(plan, plan.advised),
        "others": [_goodput(plan, one) for one in plan.others],
        "spare_nodes_needed": plan.spare_nodes,
    }
    return {name: strict(value) for name, value in facts.items()}


def fault_lines(plan: FaultPlan) -> Iterator[tuple[str, str]]:
    """Yield names and texts of a plan for a terminal."""
    faults, saving, chosen, advised = plan.faults, plan.saving, plan.chosen, plan.advised
    down_s = faults.down_s
    in_month, nodes = chosen.failures * MONTH_DAYS / plan.days, f"{faults.nodes:,} node{'s' * (faults.nodes > 1)}"
    yield (
        "failures",
        f"one every {describe_time(faults.mtbf_s)} on {nodes}, {in_month:,.0f} in {MONTH_DAYS:g} days; "
        + (f"{describe_time(down_s)} until training continues" if down_s < math.inf else "no restart is completed"),
    )
    written = f", written {describe_time(saving.write_s)} later" if saving.write_s else ""
    yield "a save", f"pauses training for {describe_time(saving.pause_s)}{written}"
    waits = "; training waits until the last one is written" if saving.write_s > chosen.interval_s else ""
    yield "saves", f"every {_interval(plan, chosen)}: goodput {percent(chosen.share, 1)}{waits}"
    if plan.steps(advised) != plan.steps(chosen):
        name = "better" if advised.share > chosen.share else "enough"  # fewer saves cost at most `TOLERANCE`
        yield name, f"every {_interval(plan, advised)}: goodput {percent(advised.share, 1)}"
    losses = {use: share for use, share in chosen.shares.items() if use != "useful" and share >= 0.0005}
    if losses:
        largest = sorted(losses.items(), key=lambda loss: -loss[1])
        yield "lost to", ", ".join(f"{LOSSES[use]} {percent(share, 1)}" for use, share in largest)
    spares = "as many as needed" if faults.spare_nodes is None else f"{faults.spare_nodes:,}"
    yield (
        "spare nodes",
        f"{spares}; {plan.spare_nodes:,} are enough for 999 of 1,000 failures, if {percent(faults.broken_share)} of "
        f"them break a node for {describe_time(faults.repair_hours * HOUR_S)}",
    )


LOSSES: Mapping[str, str] = {
    "saving": "pauses of saves",
    "lost": "repeated training",
    "detection": "failures not yet noticed",
    "waiting": "waiting for a node",
    "restart": "restarts",
}


def describe_time(seconds: float) -> str:
    """Return a length of time with up to three digits, in the unit that suits."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= (2 if name == "days" else 1) * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"


def _interval(plan: FaultPlan, goodput: Goodput) -> str:
    steps = plan.steps(goodput)
    return f"{steps:,} step{'s' * (steps != 1)} ({describe_time(goodput.interval_s)})"


def _goodput(plan: FaultPlan, goodput: Goodput) -> dict[str, Any]:
    return {
        "interval_steps": plan.steps(goodput),
        "interval_s": goodput.interval_s,
        "goodput": goodput.share,
        "standard_error": goodput.error,
        "failures": goodput.failures,
        "shares": goodput.shares,
    }
