"""Restarts: they continue the run's own checkpoints, whatever it began with, and end where they make no progress."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.checkpoint.directory import name_of
from megatron_ds.config import RunConfig
from megatron_ds.errors import DataError, LaunchError, TrainingError
from megatron_ds.training.callbacks import Callback, RunState
from megatron_ds.training.launch import Restarts
from megatron_ds.training.start_log import LAST_STEP, START_LOG, Start, StartLog, check_progress
from megatron_ds.training.supervisor import JOB, Supervisor, find_supervisor
from tests.ranks import preload
from tests.training.tiny import run_mapping

MakeRun = Callable[..., RunConfig]


class Dies(Callback):
    """Ends its rank in a step, by an exception or by SIGKILL, at most `times` times."""

    def __init__(self, folder: Path, step: int, times: int = 1, problem: Exception | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.mark, self.step, self.times, self.problem = folder / "deaths", step, times, problem

    def on_step_end(self, state: RunState) -> None:
        deaths = len(self.mark.read_text()) if self.mark.is_file() else 0
        if state.step == self.step and deaths < self.times:
            self.mark.write_text("x" * (deaths + 1))
            if self.problem is not None:
                raise self.problem
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def uncut(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that nothing happened to, with checkpoints of steps 2, 4 and 6."""
    preload()
    mapping = run_mapping(corpus, tmp_path_factory.mktemp("uncut") / "out")
    for section, entries in settings().items():
        mapping[section] = {**mapping.get(section, {}), **entries}
    run = mds.build_run(mapping)
    mds.train(run)
    return run


@pytest.fixture(autouse=True)
def imported() -> None:
    preload()


def copy_run(source: RunConfig, target: RunConfig) -> None:
    """Make the output of another run with the same checkpoints."""
    shutil.copytree(source.output, target.output)


def losses(run: RunConfig) -> dict[int, float]:
    lines = [json.loads(line) for line in (Path(run.output) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def events(run: RunConfig) -> list[str]:
    return [json.loads(line)["event"] for line in (Path(run.output) / START_LOG).read_text().splitlines()]


def settings(**checkpoint: Any) -> dict[str, dict[str, Any]]:
    return {"train": {"steps": 6, "eval_every": 0}, "data": {"valid": []}, "checkpoint": {"every": 2, **checkpoint}}


# ---- what a restart continues ----------------------------------------------------------------------------------------


def test_a_restart_continues_a_run_that_was_to_resume_nothing(
    make_run: MakeRun, tmp_path: Path, uncut: RunConfig
) -> None:
    """`never` moves an earlier run's checkpoints aside; at a restart it would move the run's own."""
    run = make_run("run", **settings(resume="never"))
    copy_run(uncut, run)
    mds.train(run, restarts=Restarts(1), callbacks=[Dies(tmp_path, step=5)])
    assert losses(run) == losses(uncut)
    output = Path(run.output)
    assert (output / "checkpoints.1" / name_of(6)).is_dir() and not (output / "checkpoints.2").exists()
    assert events(run) == ["start", "prepared", "progress", "failed", "start", "prepared", "progress", "ended"]


def test_a_restart_before_the_first_save_begins_where_the_run_began(
    make_run: MakeRun, tmp_path: Path, uncut: RunConfig
) -> None:
    run = make_run("run", **settings(resume=str(Path(uncut.output) / "checkpoints" / name_of(2)), every=4))
    mds.train(run, restarts=Restarts(2), callbacks=[Dies(tmp_path, step=3)])
    assert losses(run) == {step: loss for step, loss in losses(uncut).items() if step > 2}


def test_a_restart_does_not_take_the_checkpoints_of_an_earlier_run(
    make_run: MakeRun, tmp_path: Path, uncut: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died before they were moved aside."""
    run = make_run("run", **settings(resume="never"))
    copy_run(uncut, run)
    from megatron_ds.training import worker

    built, deaths = worker.build, tmp_path / "built"

    def build(*arguments: Any) -> Any:
        if not deaths.exists():
            deaths.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return built(*arguments)

    monkeypatch.setattr(worker, "build", build)
    mds.train(run, restarts=Restarts(1))
    assert losses(run) == losses(uncut) and (Path(run.output) / "checkpoints.1" / name_of(6)).is_dir()


# ---- restarts without progress ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [RuntimeError("sample 17\nis bad"), None], ids=["exception", "killed"])
def test_restarts_without_a_new_step_end_the_run(problem: Exception | None, make_run: MakeRun, tmp_path: Path) -> None:
    """It dies in step 5 always, and does steps 3 and 4 each time."""
    run = make_run("run", **{**settings(), "train": {"steps": 6, "max_no_progress_restarts": 2}})
    with pytest.raises(TrainingError) as caught:
        mds.train(run, restarts=Restarts(9), callbacks=[Dies(tmp_path, step=5, times=99, problem=problem)])
    cause = "RuntimeError: sample 17 is bad" if problem is not None else "GroupError: rank 0 was killed by SIGKILL, as "
    assert str(caught.value).startswith(
        "train.max_no_progress_restarts=2: 2 restarts in a row have not completed a new step under --max-restarts; "
        f"cause of the last one: {cause}"
    )
    assert (tmp_path / "deaths").read_text() == "xxx" and events(run).count("start") == 3


def test_restarts_with_progress_do_not_end_it(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", **{**settings(every=1), "train": {"steps": 4, "max_no_progress_restarts": 1}})
    mds.train(run, restarts=Restarts(9), callbacks=[Dies(tmp_path / str(step), step) for step in (2, 3)])
    assert len(losses(run)) == 4 and events(run).count("start") == 3


def test_a_run_that_nothing_restarts_has_no_log(make_run: MakeRun) -> None:
    run = make_run("run", **settings())
    mds.train(run)
    assert not (Path(run.output) / START_LOG).exists() and not (Path(run.output) / LAST_STEP).exists()


def test_a_new_start_by_hand_counts_anew(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", **{**settings(), "train": {"steps": 2, "max_no_progress_restarts": 1}})
    with pytest.raises(TrainingError, match=r"=1: 1 restart has not completed a new step under --max-restarts; "):
        mds.train(run, restarts=Restarts(9), callbacks=[Dies(tmp_path, step=1, times=2)])
    mds.train(run, restarts=Restarts(9))
    assert len(losses(run)) == 2


def series(*kinds: str) -> list[Start]:
    """A start by hand, and a restart for each letter: p = with progress, - = without, e = ended well."""
    restarts = [
        Start(Supervisor(), number, made_progress=kind == "p", has_ended=kind == "e")
        for number, kind in enumerate(kinds, start=1)
    ]
    return [Start(Supervisor(), 0), *restarts]


@pytest.mark.parametrize(
    ("kinds", "limit", "ends"),
    [
        ("---", 3, True),
        ("--", 3, False),  # the start by hand is no restart
        ("p---", 3, True),
        ("--p--", 3, False),
        ("--e--", 3, False),  # a scheduler may stop a run before its first step
        ("-", 1, True),
        ("p", 1, False),
        ("------", None, False),
    ],
)
def test_the_limit_counts_restarts_in_a_row(kinds: str, limit: int | None, ends: bool) -> None:
    supervisor = Supervisor(slurm_job="c/17", requeues=9)
    message = r"under Slurm \(job 17\); cause of the last one: no message: a rank was"
    with pytest.raises(TrainingError, match=message) if ends else nullcontext():
        check_progress(series(*kinds), supervisor, limit)


# ---- supervisors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "last", "is_restart"),
    [
        (Supervisor(processes=("torchrun a 1", "torchrun b 1")), Supervisor(processes=("torchrun b 1",)), True),
        (Supervisor(processes=("torchrun a 2",)), Supervisor(processes=("torchrun a 1",)), False),
        (Supervisor(slurm_job="c/1", requeues=1), Supervisor(slurm_job="c/1"), True),
        (Supervisor(slurm_job="c/1", requeues=1), Supervisor(slurm_job="c/1", requeues=1), False),  # a second command
        (Supervisor(slurm_job="c/1", requeues=1), Supervisor(slurm_job="c/2"), False),
        (Supervisor(job="pod"), Supervisor(job="pod"), True),
        (Supervisor(job="pod"), Supervisor(), False),
        (Supervisor(), Supervisor(), False),
    ],
)
def test_a_restart_is_known_by_its_supervisor(now: Supervisor, last: Supervisor, is_restart: bool) -> None:
    assert now.restarts(last) is is_restart


def test_supervisors_are_found_in_the_environment() -> None:
    assert not find_supervisor({})
    assert find_supervisor({JOB: "one"}) == Supervisor(job="one")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "c", "SLURM_RESTART_COUNT": "2"}
    assert find_supervisor(slurm) == Supervisor(slurm_job="c/7", requeues=2)
    (process,) = find_supervisor({"TORCHELASTIC_RUN_ID": "none"}).processes
    assert process.startswith("torchrun ") and f" {os.getppid()} " in process


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_damage_in_the_log_is_skipped(tmp_path: Path) -> None:
    log = StartLog(tmp_path)
    assert log.read() == []
    supervisor = Supervisor(job="one", processes=("a",))
    log.append_start(supervisor, 0)
    with open(tmp_path / START_LOG, "ab") as file:
        file.write(
            b'{"event": "start", "restart": "x", "supervisor": 5}\n[1]\n\xff\x00junk\n{"event": "fai\n' + b"[" * 9999
        )
        file.write(b'\n{"event": "progress", "step": 1}\n')
    log.append_start(supervisor, 1)
    log.append_failure(RuntimeError("Connection closed by peer [10.0.0.1]:2"), 0)
    log.append_failure(RuntimeError("Connection closed by peer [10.0.0.1]:2"), 1)  # one echo is enough
    log.append_failure(DataError("row 3"), 1)
    first, damaged, last = log.read()
    assert (first.restart, damaged.restart, last.restart) == (0, 0, 1) and last.supervisor == supervisor
    assert damaged.made_progress and len(last.causes) == 2 and last.cause == "DataError: row 3"


def test_failures_of_many_ranks_do_not_fill_the_log(tmp_path: Path) -> None:
    log = StartLog(tmp_path)
    for restart in range(2):
        log.append_start(Supervisor(job="one"), restart)
        for rank in range(300):
            log.append_failure(LaunchError("x" * 600), rank)
    sizes = [len(start.causes) for start in log.read()]
    assert all(50 < size < 200 for size in sizes), sizes


def test_twenty_restarts_on_a_thousand_machines_are_read(tmp_path: Path) -> None:
    agents = tuple(f"torchrun node{number} {'0' * 36} 4194304 99999999" for number in range(1000))
    log = StartLog(tmp_path)
    for restart in range(21):
        log.append_start(Supervisor(processes=agents), restart)
    assert [start.restart for start in log.read()] == list(range(21))
