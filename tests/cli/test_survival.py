"""`megatron-ds train` under what happens to real runs: schedulers' signals, the clock, killed ranks.

Whatever it was, the losses are those of a run that nothing happened to, bit for bit.
"""

import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint.directory import checkpoints_in, name_of, step_of
from megatron_ds.checkpoint.reader import first_damage
from megatron_ds.config.yaml_text import format_yaml
from tests.cli.conftest import Fork, Running, Start, processes_of, wait_for_steps, wait_until
from tests.training.tiny import run_mapping

STEPS = 60


@pytest.fixture(autouse=True)
def no_orphans(fork: Fork, tmp_path: Path) -> Iterator[None]:
    yield
    assert processes_of(tmp_path) == {}


def write_run(corpus: Path, folder: Path, name: str = "out", steps: int = STEPS) -> Path:
    mapping = run_mapping(corpus, folder / name)
    mapping["train"].update(steps=steps)
    mapping["data"].update(valid=[])
    mapping["checkpoint"] = {"every": 3, "keep": 2}
    file = folder / f"{name}.yaml"
    file.write_text(format_yaml(mapping))
    return file


def losses(output: Path) -> list[float]:
    """The losses of all steps; a validation may follow the last one."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "valid_loss" not in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def finish(process: Running, within_s: float = 120.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within_s)
    return process.returncode, out, re.sub(r"^tokenizing \S+\n", "", err, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def uncut(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run that nothing happened to."""
    from megatron_ds.config import load_run
    from megatron_ds.training.launch import train
    from tests.ranks import preload

    preload()
    folder = tmp_path_factory.mktemp("uncut")
    train(load_run(write_run(corpus, folder), ["checkpoint.every=0"]), 2)
    return losses(folder / "out")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.sweep)], ids=["SIGTERM", "SIGUSR1"]
)
def test_a_signal_ends_a_run_well_and_it_goes_on(
    number: signal.Signals, fork: Fork, corpus: Path, tmp_path: Path, uncut: list[float]
) -> None:
    file, output = write_run(corpus, tmp_path), tmp_path / "out"
    process = fork("-m", "megatron_ds", "train", file, "--nproc", 2)
    wait_for_steps(output, 10, process)
    process.send_signal(number)
    status, out, err = finish(process)
    assert (status, err) == (0, "")
    done = len(losses(output))
    newest = checkpoints_in(output / "checkpoints")[0]
    assert newest.name == name_of(done) and first_damage(newest) is None
    message = f"stopped by {number.name} after step {done} of {STEPS}; the same command resumes from checkpoint "
    assert f"{message}{newest.name}\n" in out
    status, out, _ = finish(fork("-m", "megatron_ds", "train", file, "--nproc", 2))
    assert status == 0 and f"resuming from step {done}, checkpoint" in out
    assert losses(output) == uncut


def test_the_clock_ends_a_run_well(fork: Fork, corpus: Path, tmp_path: Path) -> None:
    file, output = write_run(corpus, tmp_path, steps=100000), tmp_path / "out"
    status, out, err = finish(fork("-m", "megatron_ds", "train", file, "train.max_time=4", "--nproc", 2))
    assert (status, err) == (0, "") and "stopped by train.max_time=4 after step" in out
    assert step_of(checkpoints_in(output / "checkpoints")[0]) == len(losses(output))


@pytest.mark.sweep
def test_a_ranks_own_signal_counts_for_all_under_torchrun(start: Start, corpus: Path, tmp_path: Path) -> None:
    """As a scheduler warns one task."""
    file, output = write_run(corpus, tmp_path, steps=100000), tmp_path / "out"
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "megatron_ds", "train", file)
    process = start(*command)
    wait_for_steps(output, 5, process)
    second = [pid for pid, environ in processes_of(tmp_path).items() if environ.get("RANK") == "1"]
    os.kill(second[0], signal.SIGUSR1)
    status, out, _ = finish(process)
    assert status == 0 and "stopped by SIGUSR1 after step" in out
    assert step_of(checkpoints_in(output / "checkpoints")[0]) == len(losses(output))


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 2)


@pytest.mark.sweep
def test_torchrun_restarts_a_run_that_was_to_resume_nothing(
    start: Start, corpus: Path, tmp_path: Path, uncut: list[float]
) -> None:
    file, output = write_run(corpus, tmp_path), tmp_path / "out"
    process = start(*TORCHRUN, "-m", "megatron_ds", "train", file, "checkpoint.resume=never")
    wait_for_steps(output, 10, process)
    (second,) = [pid for pid, environ in processes_of(tmp_path).items() if environ.get("RANK") == "1"]
    os.kill(second, signal.SIGKILL)
    status, out, err = finish(process, 240)
    assert status == 0, err
    assert "restart 1 by torchrun" in out and re.search(r"resuming from step [1-9]", out)
    assert losses(output) == uncut


@pytest.mark.sweep
def test_ranks_end_soon_after_torchrun(start: Start, corpus: Path, tmp_path: Path) -> None:
    file, output = write_run(corpus, tmp_path, steps=100000), tmp_path / "out"
    process = start(*TORCHRUN, "-m", "megatron_ds", "train", file)
    wait_for_steps(output, 5, process)
    process.kill()
    wait_until(lambda: processes_of(tmp_path) == {}, 30)
    assert "which started rank 0, has ended; this rank ends too" in process.communicate()[1]


def test_ctrl_c_saves_too(fork: Fork, corpus: Path, tmp_path: Path) -> None:
    file, output = write_run(corpus, tmp_path, steps=100000), tmp_path / "out"
    process = fork("-m", "megatron_ds", "train", file, "--nproc", 2)
    wait_for_steps(output, 5, process)
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert (status, err) == (130, "") and "stopped by SIGINT after step" in out
    assert step_of(checkpoints_in(output / "checkpoints")[0]) == len(losses(output))


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def ranks_of(process: Running) -> list[int]:
    """Pids of the ranks that a command has forked."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(pid) for pid in children]


def kill_now_and_then(process: Running, output: Path, kills: int, chance: random.Random) -> int:
    """Kill random ranks at random moments, of starting, training and saving; gives how often, until the run ended."""
    for count in range(kills):
        wait_until(lambda: len(ranks_of(process)) == 2 or process.poll() is not None, 60)
        ranks = ranks_of(process)
        metrics = output / "metrics.jsonl"
        before = metrics.stat().st_mtime_ns if metrics.is_file() else 0
        if chance.random() < 0.25:
            time.sleep(chance.uniform(0.0, 2.5))
        else:  # once it trains
            wait_until(
                lambda before=before, metrics=metrics: (
                    process.poll() is not None or (metrics.is_file() and metrics.stat().st_mtime_ns > before)
                ),
                60,
            )
            time.sleep(chance.uniform(0.0, 0.4))
        if process.poll() is not None or not ranks:
            return count
        os.kill(chance.choice(ranks), signal.SIGKILL)
        wait_until(lambda ranks=ranks: not set(ranks) & set(ranks_of(process)) or process.poll() is not None, 30)
    return kills


@pytest.mark.parametrize(
    "kills", [3, pytest.param(30, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])], ids=["few", "many"]
)
def test_killed_ranks_leave_no_trace_in_the_losses(
    kills: int, fork: Fork, corpus: Path, tmp_path: Path, uncut: list[float]
) -> None:
    """kill -9 of a random rank at random moments; the built-in launcher starts the group again."""
    chance, done, runs = random.Random(5), 0, 0
    while done < kills:
        runs += 1
        file, output = write_run(corpus, tmp_path, f"run{runs}"), tmp_path / f"run{runs}"
        command = ("-m", "megatron_ds", "train", file, "train.max_no_progress_restarts=null")  # kills come faster
        process: Any = fork(*command, "--nproc", 2, "--max-restarts", kills)
        killed = kill_now_and_then(process, output, kills - done, chance)
        status, _, err = finish(process, 240)
        assert status == 0, err
        assert len(re.findall(r"was killed by SIGKILL", err)) == killed == len(re.findall(r"; restart \d+ of", err))
        assert losses(output) == uncut
        folder = output / "checkpoints"
        assert checkpoints_in(folder)[0].name == name_of(STEPS)
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".step")]
        done += killed
    print(f"\n{done} kills in {runs} runs: the losses of each are those of the run that was not killed, bit for bit")


def test_restarts_go_on_with_the_ranks_that_are_left(fork: Fork, corpus: Path, tmp_path: Path) -> None:
    """Of 4 one is killed: 3 would not divide the batch of 8, so 2 go on."""
    file, output = write_run(corpus, tmp_path, steps=40), tmp_path / "out"
    command = ("-m", "megatron_ds", "train", file, "--nproc", 4, "--max-restarts", 2, "--min-nproc", 2)
    process = fork(*command)
    wait_for_steps(output, 8, process)
    os.kill(ranks_of(process)[3], signal.SIGKILL)
    status, out, err = finish(process)
    assert status == 0, err
    assert re.search(r"rank 3 was killed by SIGKILL, .*; restart 1 of 2 with 2 ranks", err)
    assert len(losses(output)) == 40 and "world       2 = tp 1 x pp 1 x dp 2" in out


@pytest.mark.sweep
def test_a_rank_that_hangs_is_named_and_the_group_starts_again(fork: Fork, corpus: Path, tmp_path: Path) -> None:
    file, output = write_run(corpus, tmp_path, steps=60), tmp_path / "out"
    command = ("-m", "megatron_ds", "train", file, "--nproc", 2, "--max-restarts", 1, "train.step_timeout=4")
    process = fork(*command, "checkpoint.every=20")
    wait_for_steps(output, 22, process)  # and not in a save, which may take as long as it likes
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    status, _, err = finish(process)
    assert status == 0, err
    assert re.search(r"no progress for 4 s \(train.step_timeout=4\); rank 1 does not respond: .*; last phase: ", err)
    assert "; restart 1 of 1 with 2 ranks" in err
    assert len(losses(output)) == 60


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--max-restarts", 1, "checkpoint.every=0"),
            "--max-restarts=1 restarts from a checkpoint, and checkpoint.ev",
        ),
        (("--min-nproc", 1), "--min-nproc=1 has no effect without --max-restarts; try --max-restarts=1"),
        (("--max-restarts", 1, "--min-nproc", 3), "--min-nproc=3 is not between 1 and --nproc=2; nearest: 2"),
        (
            ("--max-restarts", 1, "--min-nproc", 1, "parallel.tensor=2"),
            "--min-nproc=1: the run fits none of 1 to 1 ranks (with 1: parallel.tensor=2 * parallel.pipeline=1",
        ),
        (
            ("checkpoint.resume=out/nothing",),
            "checkpoint.resume=out/nothing is not a checkpoint; try auto, never",
        ),
        (
            ("train.freeze=[lm_hed.weight]",),
            "train.freeze=lm_hed.weight matches no tensor of the model, such as",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: tuple[Any, ...], says: str, fork: Fork, corpus: Path, tmp_path: Path
) -> None:
    status, out, err = finish(fork("-m", "megatron_ds", "train", write_run(corpus, tmp_path), "--nproc", 2, *options))
    assert (status, out) == (2, "") and err.startswith(f"error: {says}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
