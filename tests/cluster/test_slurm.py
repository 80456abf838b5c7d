"""The script for Slurm of examples/multi_node under a real Slurm, that of Debian's packages, over two machines."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ds.checkpoint.directory import checkpoints_in, step_of
from megatron_ds.checkpoint.reader import first_damage
from tests.cluster.commands import difference, losses, rank_pid, start_cold, steps_done
from tests.cluster.conftest import ROOT, Alone, Cluster
from tests.cluster.services import Slurm, why_no_slurm
from tests.cluster.test_layouts import BOUND
from tests.cluster.test_restarts import (
    CHANGES,
    END_S,
    START_S,
    difference_from_one_process,
    kill_rank,
    resumed_from,
)

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm())),
]

Seen = Callable[[object], None]
SCRIPT = ROOT / "examples/multi_node/slurm.sbatch"


def _sbatch(cluster: Cluster, slurm: Slurm, run_file: Path) -> str:
    """Submit the script of the examples for one rank on each machine; return the job's id."""
    log = cluster.folder / "slurm.log"
    fixed = ("--parsable", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--open-mode=append")
    command = ("sbatch", *fixed, f"--output={log}", SCRIPT, run_file)
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
    while not resumed_from(_log(cluster)):
        assert time.monotonic() < until, slurm.run("scontrol", "show", "job", job) + _log(cluster)
        time.sleep(0.1)


def test_job(cluster: Cluster, slurm: Slurm, alone: Alone, seen: Seen) -> None:
    """The script needs no GPUs where none is asked for; all else is as it stands there."""
    run_file = cluster.write_run({"parallel": {"pipeline": 2}})
    options = ("--wait", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--open-mode=append")
    output = f"--output={cluster.folder / 'slurm.log'}"
    command = ("sbatch", *options, output, SCRIPT, run_file)
    started = start_cold(slurm.head, "sbatch", command, ROOT, cluster.folder, **slurm.environ)
    job = cluster.job([started])
    assert job.wait(START_S) == [0], job.text
    found = difference(losses(cluster.folder / "run"), alone({}))
    seen(f"{found:.0e} from one process's")
    assert found <= BOUND


def test_signal_and_requeue(cluster: Cluster, slurm: Slurm, alone: Alone, seen: Seen) -> None:
    """Slurm's warning before the time limit: the run saves and ends, and the requeued job resumes it by itself."""
    job = _sbatch(cluster, slurm, cluster.write_run(CHANGES))
    _wait_for_steps(cluster, slurm, job, 12)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    _wait_for_resume(cluster, slurm, job)
    assert _wait_for(slurm, job, {"COMPLETED", "FAILED", "CANCELLED"}, START_S) == "COMPLETED", _log(cluster)
    text, found = _log(cluster), difference_from_one_process(cluster, alone)
    assert "stopped by SIGUSR1 after step" in text
    seen(f"requeued, resumed from {resumed_from(text)}; {found:.0e} from one process's")
    assert found <= BOUND


def test_killed_task_and_scancel(cluster: Cluster, slurm: Slurm, seen: Seen) -> None:
    """A killed task ends the step, and the requeued job resumes; it ends in order when it is cancelled."""
    output = cluster.folder / "run"
    job = _sbatch(cluster, slurm, cluster.write_run(CHANGES, {"train": {**CHANGES["train"], "steps": 100000}}))
    _wait_for_steps(cluster, slurm, job, 12)
    kill_rank(cluster.machines[1], "SLURM_PROCID=1")
    _wait_for_resume(cluster, slurm, job)
    _wait_for_steps(cluster, slurm, job, steps_done(output) + 10)
    slurm.run("scancel", job)
    assert _wait_for(slurm, job, {"CANCELLED", "FAILED", "COMPLETED"}, END_S) == "CANCELLED", _log(cluster)
    while any(rank_pid(machine, f"SLURM_JOB_ID={job}") for machine in cluster.machines):
        time.sleep(0.1)
    newest, text = checkpoints_in(output / "checkpoints")[0], _log(cluster)
    seen(f"resumed from {resumed_from(text)}; cancelled after step {steps_done(output)}")
    assert step_of(newest) == steps_done(output) and first_damage(newest) is None
    assert "stopped by SIGTERM after step" in text and len(resumed_from(text)) == 1
