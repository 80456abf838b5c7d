"""Who hangs is named: a stopped rank, one that is behind, or all that wait; a run that goes on is left alone."""

import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ds.errors import LaunchError
from megatron_ds.parallel import launch
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.rank_status import FileStatusStore, RankStatus, TorchStoreStatusStore, rank_status_store
from megatron_ds.parallel.watchdog import Watchdog, diagnose
from tests.ranks import run_ranks

TIMEOUT_S = 2.0


def _steps(info: RankInfo, at: str) -> None:
    with Watchdog(info, TIMEOUT_S, rank_status_store()) as watchdog:
        for step in range(1, 6):
            watchdog.heartbeat(f"step {step}: reading data")
            if step == 3 and info.rank == 1 and at == "reading":
                time.sleep(60)
            watchdog.heartbeat(f"step {step}: computing")
            if step == 3 and info.rank == 1 and at == "stopped":
                time.sleep(1.0)  # its watchdog has told
                os.kill(os.getpid(), signal.SIGSTOP)
            if step == 3 and info.rank == 1 and at == "computing":
                time.sleep(60)
            dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("at", "says"),
    [
        (
            "reading",
            r"rank 1 is behind the others; last phase: step 3: reading data; ranks 0, 2 are waiting in: step 3: c",
        ),
        (
            "stopped",
            r"rank 1 does not respond: .*; last phase: step 3: computing; ranks 0, 2 are waiting in: step 3: c",
        ),
        ("computing", r"ranks 0, 1, 2 are in: step 3: computing"),
    ],
)
def test_the_rank_that_hangs_is_named(at: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    began = time.monotonic()
    with pytest.raises(LaunchError, match=rf"^no progress for 2 s \(train.step_timeout=2\); {says}") as caught:
        run_ranks(_steps, 3, at)
    assert time.monotonic() - began < TIMEOUT_S + 20
    if at == "reading":
        assert re.search(r"stack of rank 1:\n(.*\n)*.* in _steps", str(caught.value)), "its stack, not another's"


def _slow_but_going(info: RankInfo) -> str:
    with Watchdog(info, 0.5, rank_status_store()) as watchdog:
        for part in range(8):
            watchdog.heartbeat(f"part {part}")
            time.sleep(0.2)
    return "done"


def test_a_run_that_goes_on_is_left_alone() -> None:
    assert run_ranks(_slow_but_going, 2) == ["done", "done"]


def test_what_may_take_long_is_no_hang_and_neither_is_a_job_that_was_stopped() -> None:
    def saves(info: RankInfo) -> str:
        with Watchdog(info, 0.4, rank_status_store()) as watchdog:
            watchdog.heartbeat("saving", may_take_long=True)
            time.sleep(1.5)
            watchdog.heartbeat("step 2")
            if os.fork() == 0:  # goes on with the stopped process
                time.sleep(3.0)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.3)
            watchdog.heartbeat("step 3")
        return "done"

    assert run_ranks(saves, 1) == ["done"]


def test_a_board_that_does_not_answer_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a launcher the first rank keeps it, and may be the one that hangs."""
    from megatron_ds.parallel import watchdog as module

    monkeypatch.setattr(module, "STORE_TIMEOUT_S", 1.0)

    class Dead(FileStatusStore):
        def put(self, rank: int, status: RankStatus) -> None:
            if status.number:
                time.sleep(60)

        def claim(self) -> bool:
            time.sleep(60)
            return True

    def stands(info: RankInfo) -> None:
        with Watchdog(info, 0.5, Dead(Path("/nowhere"))):
            time.sleep(60)

    with pytest.raises(
        LaunchError, match=r"^no progress for 0.5 s .*; rank 0 or its machine does not respond; this rank's phase: st"
    ):
        run_ranks(stands, 1)


def test_zero_turns_it_off() -> None:
    def stands(info: RankInfo) -> str:
        with Watchdog(info, 0.0, rank_status_store()):
            time.sleep(0.5)
        return "done"

    assert run_ranks(stands, 1) == ["done"]


def test_the_board_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like the one in a folder: notes are read by all, one rank claims."""

    def two_boards(info: Any) -> Any:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)
        first, second = (TorchStoreStatusStore("127.0.0.1", server.port) for _ in range(2))
        first.put(1, RankStatus(3, 2, "step 1", "here"))
        assert first.read(1).number == 3  # a set has no answer, so another connection may be served before it
        found = second.read(1), second.read(0), first.claim(), second.claim()
        after_a_restart = TorchStoreStatusStore("127.0.0.1", server.port, "1")
        assert after_a_restart.read(1) == RankStatus() and after_a_restart.claim()
        del server
        return found

    assert launch.run_local(two_boards, 1)[0] == (RankStatus(3, 2, "step 1", "here"), RankStatus(), True, False)


def test_the_board_in_a_folder(tmp_path: Path) -> None:
    first, second = FileStatusStore(tmp_path), FileStatusStore(tmp_path)
    first.put(1, RankStatus(3, 2, "step 1", "here"))
    assert (second.read(1), second.read(0)) == (RankStatus(3, 2, "step 1", "here"), RankStatus())
    assert (first.claim(), second.claim()) == (True, False)


def test_of_one_rank_the_place_is_told() -> None:
    said = diagnose([RankStatus(9, 4, "step 2: reading data", "a stack")], [True], 30.0)
    first, rest = said.split("\n", 1)
    assert first == "no progress for 30 s (train.step_timeout=30); rank 0 is in: step 2: reading data"
    assert rest == "stack of rank 0:\na stack"
