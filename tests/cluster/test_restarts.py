"""Restarts over machines, by hand, by torchrun and by Slurm: the losses are those of one process without a restart."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ds.checkpoint.directory import checkpoints_in, step_of
from megatron_ds.checkpoint.reader import first_damage
from tests.cluster.commands import Job, difference, losses, rank_pid, start_cold, steps_done
from tests.cluster.conftest import ROOT, Alone, Cluster, Sections
from tests.cluster.machines import Machine
from tests.cluster.services import Slurm, why_no_slurm
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


def _same(cluster: Cluster, alone: Alone) -> float:
    return difference(losses(cluster.folder / "run"), alone({**CHANGES, "checkpoint": {"every": 0}}))


def _resumed_from(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"resuming from step (\d+)", text)]


def _kill_rank(machine: Machine, variable: str) -> None:
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
    found = _same(cluster, alone)
    seen(f"rank 0 ended after {ended_s:.1f} s; resumed from {_resumed_from(again.text)}; {found:.0e}")
    assert found <= BOUND and min(_resumed_from(again.text)) >= 10


def test_torchrun_restarts_after_a_killed_rank(cluster: Cluster, alone: Alone, seen: Seen) -> None:
    job = cluster.start_torchrun(cluster.write_run(CHANGES), cluster.port(), RESTARTS)
    job.wait_until(lambda: steps_done(cluster.folder / "run") >= 12)
    _kill_rank(cluster.machines[1], "LOCAL_RANK=0")  # torchrun gives out the ranks in any order
    assert job.wait(START_S) == [0, 0], job.text
    found = _same(cluster, alone)
    seen(f"resumed from {_resumed_from(job.text)}; {found:.0e} from one process's")
    assert found <= BOUND and len(_resumed_from(job.text)) == 1


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
    found = _same(cluster, alone)
    seen(f"rank 0 ended after {ended_s:.0f} s; resumed from {_resumed_from(job.text)}; {found:.0e}")
    assert found <= BOUND and len(_resumed_from(job.text)) == 1


# ---- Slurm -----------------------------------------------------------------------------------------------------------

needs_slurm = pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm()))


def _sbatch(cluster: Cluster, slurm: Slurm, run_file: Path) -> str:
    """Submit the script of the examples for one rank on each machine; return the job's id."""
    log = cluster.folder / "slurm.log"
    fixed = ("--parsable", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--open-mode=append")
    command = ("sbatch", *fixed, f"--output={log}", ROOT / "examples/multi_node/slurm.sbatch", run_file)
    submitted = start_cold(slurm.head, "sbatch", command, ROOT, cluster.folder, **slurm.environ)
    job = cluster.job([submitted])
    assert job.wait(20) == [0], job.text
    return submitted.text.strip().splitlines()[-1]


def _wait_for(slurm: Slurm, job: str, states: set[str], limit_s: float) -> str:
    until = time.monotonic() + limit_s
    while (state := slurm.state(job)) not in states and time.monotonic() < until:
        time.sleep(0.1)
    return state


def _wait_for_steps(cluster: Cluster, slurm: Slurm, job: str, steps: int) -> None:
    until = time.monotonic() + START_S
    while steps_done(cluster.folder / "run") < steps:
        assert time.monotonic() < until and slurm.state(job) in ("PENDING", "CONFIGURING", "RUNNING"), _log(cluster)
        time.sleep(0.02)


def _log(cluster: Cluster) -> str:
    file = cluster.folder / "slurm.log"
    return file.read_text(errors="replace") if file.is_file() else "no log"


def _wait_for_resume(cluster: Cluster, slurm: Slurm, job: str) -> None:
    until = time.monotonic() + START_S
    while not _resumed_from(_log(cluster)):
        assert time.monotonic() < until, slurm.run("scontrol", "show", "job", job) + _log(cluster)
        time.sleep(0.1)


@needs_slurm
def test_slurm_signal_and_requeue(cluster: Cluster, slurm: Slurm, alone: Alone, seen: Seen) -> None:
    """Slurm's warning before the time limit: the run saves and ends, and the requeued job resumes it by itself."""
    job = _sbatch(cluster, slurm, cluster.write_run(CHANGES))
    _wait_for_steps(cluster, slurm, job, 12)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    _wait_for_resume(cluster, slurm, job)
    assert _wait_for(slurm, job, {"COMPLETED", "FAILED", "CANCELLED"}, START_S) == "COMPLETED", _log(cluster)
    text, found = _log(cluster), _same(cluster, alone)
    assert "stopped by SIGUSR1 after step" in text
    seen(f"requeued, resumed from {_resumed_from(text)}; {found:.0e} from one process's")
    assert found <= BOUND


@needs_slurm
def test_slurm_killed_task_and_scancel(cluster: Cluster, slurm: Slurm, seen: Seen) -> None:
    """A killed task ends the step, and the requeued job resumes; it ends in order when it is cancelled."""
    output = cluster.folder / "run"
    job = _sbatch(cluster, slurm, cluster.write_run(CHANGES, {"train": {**CHANGES["train"], "steps": 100000}}))
    _wait_for_steps(cluster, slurm, job, 12)
    _kill_rank(cluster.machines[1], "SLURM_PROCID=1")
    _wait_for_resume(cluster, slurm, job)
    _wait_for_steps(cluster, slurm, job, steps_done(output) + 10)
    slurm.run("scancel", job)
    assert _wait_for(slurm, job, {"CANCELLED", "FAILED", "COMPLETED"}, END_S) == "CANCELLED", _log(cluster)
    while any(rank_pid(machine, f"SLURM_JOB_ID={job}") for machine in cluster.machines):
        time.sleep(0.1)
    newest, text = checkpoints_in(output / "checkpoints")[0], _log(cluster)
    seen(f"resumed from {_resumed_from(text)}; cancelled after step {steps_done(output)}")
    assert step_of(newest) == steps_done(output) and first_damage(newest) is None
    assert "stopped by SIGTERM after step" in text and len(_resumed_from(text)) == 1
