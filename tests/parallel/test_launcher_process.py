"""A rank whose launcher has died ends within seconds, with or without a shell between them; a living one is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ds.parallel import launcher_process
from megatron_ds.parallel.launcher_process import LauncherProcess, find_launcher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

RANK = (
    "import sys, time; from megatron_ds.parallel.launcher_process import end_with_launcher; "
    "end_with_launcher(3); print('ready', flush=True); time.sleep(60)"
)
LAUNCHER = """
import os, subprocess, sys, time
rank = subprocess.Popen(sys.argv[2:], env={**os.environ, **dict([sys.argv[1].split("=")])})
rank.wait()
"""
VARIABLES = ("TORCHELASTIC_RUN_ID=none", "CROSS_RANK=0")
DIRECT = (sys.executable, "-c", RANK)
THROUGH_A_SHELL = ("bash", "-c", '"$0" -c "$1"; true', sys.executable, RANK)


class Launched:
    """A launcher's process, and its rank, which is ready."""

    def __init__(self, setting: str, command: tuple[str, ...]) -> None:
        self.launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, setting, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.group = self.launcher.pid
        assert self.launcher.stdout is not None
        assert self.launcher.stdout.readline() == "ready\n"

    def kill_launcher(self) -> tuple[float, str]:
        """Seconds until every process of the rank has ended, and what the rank wrote."""
        began = time.monotonic()
        self.launcher.kill()
        _, err = self.launcher.communicate(timeout=20)  # returns once the rank has closed its streams
        return time.monotonic() - began, err


@pytest.fixture
def groups() -> Iterator[list[int]]:
    begun: list[int] = []
    yield begun
    for group in begun:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.parametrize("command", [DIRECT, THROUGH_A_SHELL], ids=["direct", "through a shell"])
@pytest.mark.parametrize("setting", VARIABLES)
def test_a_rank_ends_soon_after_its_launcher(setting: str, command: tuple[str, ...], groups: list[int]) -> None:
    launched = Launched(setting, command)
    groups.append(launched.group)
    took_s, err = launched.kill_launcher()
    name = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}[setting.partition("=")[0]]
    assert took_s < 10 and f"{name} (process {launched.launcher.pid}), which started rank 3, has ended" in err


def test_a_rank_whose_launcher_lives_goes_on(groups: list[int]) -> None:
    launched = Launched(VARIABLES[0], DIRECT)
    groups.append(launched.group)
    time.sleep(2.5 * launcher_process.POLL_S)
    assert launched.launcher.poll() is None


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0", "WORLD_SIZE": "2"},  # by hand: in a shell that may be closed
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # a batch script, which starts its ranks itself
        {"TORCHELASTIC_RUN_ID": "none", "MEGATRON_DS_RENDEZVOUS": "/tmp/x"},  # a fork of `run_local`
    ],
)
def test_ranks_without_a_launcher_have_none_to_watch(environ: dict[str, str]) -> None:
    assert find_launcher(environ) is None


def test_a_later_process_of_the_same_id_is_another_one() -> None:
    own = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()
    launcher = LauncherProcess("torchrun", os.getpid(), int(own[19]))
    assert launcher.is_alive
    assert not LauncherProcess("torchrun", os.getpid(), int(own[19]) - 1).is_alive


def test_a_launcher_that_nothing_has_waited_for_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    stat = Path(f"/proc/{child.pid}/stat")
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert not LauncherProcess("torchrun", child.pid, ticks).is_alive
    child.wait()
