"""The command line before anything is run: help, speed, exit statuses, one line for a mistake."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer.main

from megatron_ds.cli.main import _leave, app
from megatron_ds.errors import ConfigError, HardwareError, LaunchError
from megatron_ds.parallel.rank_info import LAUNCHERS, RankInfo
from megatron_ds.training import launch
from tests.cli.conftest import Fork, Start

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_shows_an_example_and_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    code = (
        "import sys; sys.argv = ['megatron-ds', *sys.argv[1:]]\n"
        "from megatron_ds.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'deepspeed', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=True)
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "[]" and done.stderr == ""
    assert any(line.strip() in ("Example:", "Examples:") for line in lines)
    assert any(line.startswith(f"    {' '.join(('megatron-ds', *command))}") for line in lines), "an example of its own"
    assert lines[0].startswith("Usage: megatron-ds") and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "nope.yaml"],
        ["plan", "nope.yaml"],
        ["plan", str(ROOT / "examples/plan/llama3_8b.yaml"), "train.stps=1"],
        ["plan", str(ROOT / "examples/plan/llama3_8b.yaml"), "--device", "h1000"],
    ],
)
def test_a_mistake_in_a_run_file_is_found_before_anything_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['megatron-ds', *sys.argv[1:]]\n"
        "from megatron_ds.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done


def test_without_arguments_it_shows_its_help(start: Start) -> None:
    out, err = start("-m", "megatron_ds").communicate()
    assert out.startswith("Usage: megatron-ds [OPTIONS] COMMAND") and err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "error: Missing argument 'RUN.yaml'; see megatron-ds train --help\n"),
        (["tran"], "error: No such command 'tran'. Did you mean 'train'?; see megatron-ds --help\n"),
        (
            ["train", "--nprc", "2"],
            "error: No such option: --nprc (Possible options: --min-nproc, --nproc); see ",
        ),
        (
            ["train", "run.yaml", "--optimizer.lr=1e-4"],
            "error: No such option: --optimizer.lr; write optimizer.lr=VALUE, without dashes\n",
        ),
        (["train", "nope.yaml"], "error: run file nope.yaml does not exist"),
        (["train", "run.yaml", "train.stps=1"], "error: train.stps: unknown key; did you mean train.steps?\n"),
        (["train", "run.yaml", "--nproc", "0"], "error: --nproc=0 is less than one rank; nearest: 1\n"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(start: Start, run_file: Path, arguments: list[str], message: str) -> None:
    process = start("-m", "megatron_ds", *arguments)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith(message) and err.count("\n") == 1
    assert list(run_file.parent.iterdir()) == [run_file], "nothing half-written"


def test_half_a_launchers_environment_is_one_line(start: Start, run_file: Path) -> None:
    process = start("-m", "megatron_ds", "train", run_file, RANK="0", LOCAL_RANK="0")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert (
        err.startswith("error: the environment sets RANK=0, LOCAL_RANK=0 but not WORLD_SIZE, ") and err.count("\n") == 1
    )


@pytest.mark.sweep
def test_other_ranks_leave_a_mistake_in_the_file_to_rank_0(start: Start, run_file: Path) -> None:
    """They speak later: without a launcher that ends them, there may be no rank 0, only its left-over variables."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = ("-m", "megatron_ds", "train", run_file, "train.stps=1")
    first = start(*command, RANK="0", LOCAL_RANK="0", **place)
    second = start(*command, RANK="1", LOCAL_RANK="1", **place)
    assert first.communicate() == ("", "error: train.stps: unknown key; did you mean train.steps?\n")
    assert second.poll() is None, "it waits: torchrun would end rank 0 as soon as this one ends"
    assert second.communicate() == ("", "rank 1: error: train.stps: unknown key; did you mean train.steps?\n")
    assert (first.returncode, second.returncode) == (2, 2)


def test_commands_that_are_no_ranks_ignore_left_over_variables(fork: Fork, run_file: Path) -> None:
    began = time.monotonic()
    out, err = fork("-m", "megatron_ds", "inspect", "nothing", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1").communicate()
    assert out == "" and err.startswith("error: nothing") and time.monotonic() - began < 4


@pytest.mark.parametrize(
    ("words", "offered"), [("megatron-ds ver", "verify"), ("megatron-ds train --np", "--nproc"), ("megatron-ds no", "")]
)
def test_shells_complete_commands_and_options(words: str, offered: str) -> None:
    environment = {
        **os.environ,
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "_MEGATRON_DS_COMPLETE": "complete_bash",
    }
    done = subprocess.run([sys.executable, "-m", "megatron_ds"], capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.stderr) == (offered, "")


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_errors_are_red_on_a_terminal_unless_colours_are_refused(
    fork: Fork, variables: dict[str, str], coloured: bool
) -> None:
    window, terminal = os.openpty()
    process = fork(
        *("-m", "megatron_ds", "train", "nope.yaml"),
        streams=(0, terminal, terminal),
        **{"TERM": "xterm", "NO_COLOR": "", **variables},
    )
    assert process.wait(60) == 2
    os.close(terminal)
    shown = os.read(window, 4096).decode()
    os.close(window)
    assert "error:" in shown and "run file nope.yaml does not exist" in shown
    assert ("31m" in shown) == coloured, shown


def _exit(status: int) -> NoReturn:
    raise SystemExit(status)


@pytest.mark.parametrize(
    ("variables", "has_peers"),
    [
        ({"RANK": "0"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({}, False),
    ],
)
def test_a_launchers_rank_that_failed_waits_for_no_peers(
    variables: dict[str, str], has_peers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "_exit", _exit)
    for name in ("RANK", *LAUNCHERS, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if has_peers:
        with pytest.raises(SystemExit, match=r"^2$"):
            _leave(2)
    else:
        assert _leave(2) == 2


@pytest.mark.parametrize(("problem", "status"), [(ConfigError, 2), (LaunchError, 1), (HardwareError, 1)])
def test_only_a_mistake_of_the_users_is_status_2_on_any_rank(
    problem: type[Exception], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose ranks lost each other is started again, by slurm.sbatch too; a wrong run file is not."""

    def fails(*_: Any) -> NoReturn:
        raise problem("it")

    monkeypatch.setattr(launch, "_leave", _exit)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit, match=rf"^{status}$"):
        launch._train_launched(None, RankInfo(1, 2, 1), fails)  # type: ignore[arg-type]
