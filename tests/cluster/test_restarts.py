"""Restarts over machines, by hand and by torchrun: the losses are those of one process without a restart."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.commands import Job, difference, losses, rank_pid, steps_done
from tests.cluster.conftest import Alone, Cluster, Sections
from tests.cluster.machines import Machine
from tests.cluster.test_layouts import BOUND

pytestmark = pytest.mark.timeout(600)

Seen = Callable[[object], None]
STEPS = 150
CHANGES: Sections = {
    "train": {"steps": STEPS, "eval_every": 0, "step_timeout": 6},
    "data": {"valid": []},
    "checkpoint": {"every": 5, "keep": 2},
}
RESTARTS = ("--max-restarts", "2")
DEAD_AGENT_S = 17  # torchrun counts an agent among the living for 15 s: a restart that comes earlier waits for it
END_S = 60.0  # until all ranks have ended, after one was lost
START_S = 180.0  # of two cold ranks, their launchers, and the run


def difference_from_one_process(cluster: Cluster, alone: Alone) -> float:
    return difference(losses(cluster.folder / "run"), alone({**CHANGES, "checkpoint": {"every": 0}}))


def resumed_from(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"resuming from step (\d+)", text)]


def kill_rank(machine: Machine, variable: str) -> None:
    pid = rank_pid(machine, variable)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def _kill_machine(job: Job, machine: Machine) -> None:
    """Kill all of a job's second machine without a word to the first; its cable is pulled before."""
    with machine.cut_off():
        job[1].kill_all()
        since = time.monotonic()
        first = job[0].descendants()[0]
        while Path(f"/proc/{first}").exists() and time.monotonic() - since < END_S:
            time.sleep(0.05)
        assert not Path(f"/proc/{first}").exists(), job.text


def test_killed_rank_by_hand(cluster: Cluster, alone: Alone, seen: Seen) -> None:
    run_file = cluster.write_run(CHANGES)
    job = cluster.start_ranks(run_file)
    job.wait_until(lambda: steps_done(cluster.folder / "run") >= 12)
    since = time.monotonic()
    job[1].kill()
    assert job.wait(END_S)[0] not in (None, 0), job.text
    ended_s = time.monotonic() - since
    again = cluster.start_ranks(run_file)
    assert set(again.wait(60)) == {0}, again.text
    found = difference_from_one_process(cluster, alone)
    seen(f"rank 0 ended after {ended_s:.1f} s; resumed from {resumed_from(again.text)}; {found:.0e}")
    assert found <= BOUND and min(resumed_from(again.text)) >= 10


def test_torchrun_restarts_after_a_killed_rank(cluster: Cluster, alone: Alone, seen: Seen) -> None:
    job = cluster.start_torchrun(cluster.write_run(CHANGES), cluster.port(), RESTARTS)
    job.wait_until(lambda: steps_done(cluster.folder / "run") >= 12)
    kill_rank(cluster.machines[1], "LOCAL_RANK=0")  # torchrun gives out the ranks in any order
    assert job.wait(START_S) == [0, 0], job.text
    found = difference_from_one_process(cluster, alone)
    seen(f"resumed from {resumed_from(job.text)}; {found:.0e} from one process's")
    assert found <= BOUND and len(resumed_from(job.text)) == 1


def test_torchrun_restarts_after_a_dead_machine(cluster: Cluster, alone: Alone, seen: Seen) -> None:
    """Its power fails; it comes back with a new torchrun, and the first machine's has waited for it."""
    train = {**CHANGES["train"], "step_timeout": DEAD_AGENT_S}
    run_file, port = cluster.write_run(CHANGES, {"train": train}), cluster.port()
    job = cluster.start_torchrun(run_file, port, RESTARTS)
    job.wait_until(lambda: steps_done(cluster.folder / "run") >= 12)
    since = time.monotonic()
    _kill_machine(job, cluster.machines[1])
    ended_s = time.monotonic() - since
    job.commands[1] = cluster.torchrun_on(cluster.machines[1], run_file, port, RESTARTS)
    assert job.wait(START_S) == [0, 0], job.text
    found = difference_from_one_process(cluster, alone)
    seen(f"rank 0 ended after {ended_s:.0f} s; resumed from {resumed_from(job.text)}; {found:.0e}")
    assert found <= BOUND and len(resumed_from(job.text)) == 1
