"""A machine that is cut off, or a rank that is stopped, at every place of a run: all ranks end, and say why.

All jobs run at the same time on the same machines, each with ranks that pause at another place; then the cable is
pulled, or rank 1 of each stopped, once.
"""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cluster.commands import Job
from tests.cluster.conftest import Cluster
from tests.cluster.pauses import PLACES, Pause

STEP_TIMEOUT_S = 5
LIMIT_S = 60.0  # until every rank has ended
CHANGES: dict[str, Any] = {
    "train": {"steps": 4, "eval_every": 4, "step_timeout": STEP_TIMEOUT_S, "start_timeout": 20},
    "checkpoint": {"every": 2, "asynchronous": False},
}


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        after_s: seconds from the fault until the last rank ended; None = one was still running after `LIMIT_S`.
        job: its ranks.
    """

    after_s: float | None
    job: Job


Ends = Mapping[str, Ended]


def _begin(cluster: Cluster, fault: str) -> dict[str, tuple[Pause, Job]]:
    """Start a job for each place and wait until its ranks pause there."""
    begun = {}
    for place in PLACES:
        name = f"{fault}-{place}"
        pause = Pause(place, cluster.folder / f"{name}.pause")
        run_file = cluster.write_run(CHANGES, {"export": {"path": str(cluster.folder / f"{name}.hf")}}, name=name)
        begun[place] = pause, cluster.start_ranks(run_file, pause=pause)
    for pause, job in begun.values():
        pause.wait(job)
    return begun


def _ends(begun: Mapping[str, tuple[Pause, Job]], ranks: list[int]) -> Ends:
    """Resume all and wait for the end of some of each job's ranks."""
    since = time.monotonic()
    for pause, _ in begun.values():
        pause.resume()
    after: dict[str, float] = {}
    while len(after) < len(begun) and time.monotonic() - since < LIMIT_S:
        for place, (_, job) in begun.items():
            if place not in after and None not in job.wait(0, ranks):
                after[place] = time.monotonic() - since
        time.sleep(0.05)
    return {place: Ended(after.get(place), job) for place, (_, job) in begun.items()}


@pytest.fixture(scope="module")
def cut(module_cluster: Cluster) -> Ends:
    """The ends of jobs whose second machine was cut off."""
    begun = _begin(module_cluster, "cut")
    with module_cluster.machines[1].cut_off():
        return _ends(begun, [0, 1])


@pytest.fixture(scope="module")
def stopped(module_cluster: Cluster) -> Ends:
    """The ends of jobs whose rank 1 was stopped."""
    begun = _begin(module_cluster, "stopped")
    for _, job in begun.values():
        job[1].kill(signal.SIGSTOP)
    return _ends(begun, [0])


def _check(ended: Ended, ranks: list[int], seen: Callable[[object], None]) -> None:
    last = " / ".join((ended.job[rank].text.strip().splitlines() or ["nothing said"])[-1][:100] for rank in ranks)
    seen(f"ended after {ended.after_s and round(ended.after_s, 1)} s, {ended.job.statuses}: {last}")
    assert ended.after_s is not None, ended.job.text
    assert 0 not in ended.job.statuses
    assert "rank 1 on node2 does not respond" in ended.job[0].text


@pytest.mark.timeout(200)
@pytest.mark.parametrize("place", PLACES)
def test_link_cut_in(place: str, cut: Ends, seen: Callable[[object], None]) -> None:
    _check(cut[place], [0, 1], seen)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("place", PLACES)
def test_rank_stopped_in(place: str, stopped: Ends, seen: Callable[[object], None]) -> None:
    _check(stopped[place], [0], seen)
