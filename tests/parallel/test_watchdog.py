"""Who hangs is named: a stopped rank, one that is behind, or all that wait; a run that goes on is left alone."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ds.errors import LaunchError
from megatron_ds.parallel import launch, section_limits
from megatron_ds.parallel import watchdog as watchdog_module
from megatron_ds.parallel.consensus import gather_objects
from megatron_ds.parallel.rank_files import FAILURE_FILE
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.rank_status import FileStatusStore, RankStatus, TorchStoreStatusStore, rank_status_store
from megatron_ds.parallel.section_limits import SectionLimits
from megatron_ds.parallel.watchdog import Watchdog, diagnose, watch_peers
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


def test_a_report_about_a_thousand_ranks_is_short() -> None:
    statuses = [RankStatus(9, 4 - rank % 2, "computing", "line\n" * 100) for rank in range(1000)]
    found = diagnose(statuses, [True] * 1000, 30.0)
    assert found.count("is behind the others") == 8 and "; the same holds for 492 more ranks; " in found
    assert "; ranks 0, 2, 4, 6, 8, 10, 12, 14 and 492 more are waiting in: computing\n" in found
    assert found.count("stack of rank") == 4


# ---- phases that may take long ---------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of about a second, for ranks that are forked from here."""
    for module, name, seconds in (
        (launch, "GRACE_S", 0.5),
        (section_limits, "FIRST_S", 3.0),
        (section_limits, "SHORTEST_S", 0.8),
        (watchdog_module, "SHORTEST_SILENCE_S", 1.2),
        (watchdog_module, "STORE_TIMEOUT_S", 1.0),
    ):
        monkeypatch.setattr(module, name, seconds)


def _long_phases(info: RankInfo, at: str, file: str) -> str:
    """Two saves and an export; rank 1 stands still in one of them, or writes slowly."""
    with Watchdog(info, 0.4, rank_status_store()) as watchdog:
        for number in (1, 2):
            watchdog.heartbeat(f"saving after step {number}", may_take_long=True)
            if info.rank == 1 and at == f"asleep in save {number}":
                time.sleep(60)
            if info.rank == 1 and at == "slow but writing":
                with open(file, "wb", buffering=0) as place:
                    for _ in range(16):
                        place.write(bytes(2 * section_limits.MOVED_BYTES))
                        place.seek(0)
                        time.sleep(0.25)
            time.sleep(0.05)
            gather_objects(info.rank)
        watchdog.heartbeat("exporting", may_take_long=True)
        if info.rank == 1 and at == "stopped":
            time.sleep(0.5)  # its status is published
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(1))
        if at == "one leaves early" and info.rank == 0:
            time.sleep(3.5)
    dist.barrier()
    return "done"


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (
            "asleep in save 1",
            r"no progress of any rank for 3 s \(train.step_timeout=0.4; the first such phase\); rank 1 is waited for "
            r"by the others; last phase: saving after step 1; ranks 0, 2 are waiting in: saving after step 1\nstack of",
        ),
        (
            "asleep in save 2",
            r"no progress of any rank for \S+ s \(train.step_timeout=0.4; the slowest such phase so far took \S+ s\); "
            r"rank 1 is waited for by the others; last phase: saving after step 2; ranks 0, 2 are waiting in: saving",
        ),
        (
            "stopped",
            r"no sign of rank 1 for 1.2 s \(train.step_timeout=0.4\); rank 1 does not respond: .*; last phase: exp"
            r"orting; ranks 0, 2 are waiting in: exporting",
        ),
    ],
)
def test_a_hang_in_a_phase_that_may_take_long_is_named(at: str, message: str, impatient: None, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=f"^{message}"):
        run_ranks(_long_phases, 3, at, str(tmp_path / "file"))


@pytest.mark.parametrize("at", ["slow but writing", pytest.param("one leaves early", marks=pytest.mark.sweep)])
def test_progress_of_one_rank_is_progress_of_all(at: str, impatient: None, tmp_path: Path) -> None:
    assert run_ranks(_long_phases, 2, at, str(tmp_path / "file")) == ["done", "done"]


def test_a_job_that_is_suspended_in_a_long_phase_continues(impatient: None) -> None:
    def suspended(info: RankInfo) -> str:
        with Watchdog(info, 0.4, rank_status_store()) as watchdog:
            watchdog.heartbeat("saving after step 1", may_take_long=True)
            if os.fork() == 0:
                time.sleep(3.5)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.5)
        return "done"

    assert run_ranks(suspended, 2) == ["done", "done"]


@pytest.mark.sweep
def test_only_ranks_that_do_not_respond_are_a_hang_in_code_of_the_users(impatient: None) -> None:
    def own_code(info: RankInfo, at: str) -> str:
        with watch_peers(info, timeout_s=0.4):
            time.sleep(2.0)
            if at == "stopped" and info.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            dist.barrier()
        return "done"

    assert run_ranks(own_code, 2, "slow") == ["done", "done"]
    with pytest.raises(LaunchError, match=r"^no sign of rank 1 for 1.2 s; rank 1 does not respond: .* last phase: run"):
        run_ranks(own_code, 2, "stopped")


def test_a_store_that_is_gone_is_rank_0_that_is_gone(impatient: None, tmp_path: Path) -> None:
    class Gone(FileStatusStore):
        def sign_of_life(self, rank: int) -> int:
            raise RuntimeError("connection reset")

    def waits(info: RankInfo) -> None:
        with Watchdog(info, 0.4, Gone(tmp_path)) as watchdog:
            watchdog.heartbeat("exporting", may_take_long=True)
            time.sleep(60)

    with pytest.raises(LaunchError, match=r"^no answer of rank 0 for 1.2 s .*rank 0 or its machine does not respond; "):
        run_ranks(waits, 1)


def test_limits_are_learned_from_phases_of_the_same_kind() -> None:
    limits = SectionLimits(30.0)
    limits.took("saving after step 10", 7.0)
    limits.took("saving after step 20", 6.0)
    assert limits.limit_s("saving after step 30") == 70.0
    assert limits.limit_s("exporting") == section_limits.FIRST_S
    limits.took("exporting", 0.1)
    assert limits.limit_s("exporting") == 30.0, "never below the limit of a step"
    assert SectionLimits(4.0).limit_s("exporting") == section_limits.FIRST_S


def test_machines_are_named_where_there_are_several() -> None:
    statuses = [RankStatus(9, 4, "saving", host="node1"), RankStatus(9, 4, "saving", host="node2")]
    assert "; rank 1 on node2 does not respond: " in diagnose(statuses, [True, False], 30.0)


def test_a_hang_leaves_no_child_processes(impatient: None, tmp_path: Path) -> None:
    def waits(info: RankInfo) -> None:
        with Watchdog(info, 0.4, rank_status_store()):
            child = subprocess.Popen(["sleep", "100"], start_new_session=True)
            (tmp_path / "child").write_text(str(child.pid))
            time.sleep(60)

    with pytest.raises(LaunchError, match=r"^no progress for 0.4 s "):
        run_ranks(waits, 1)
    state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_a_child_reads_and_writes_is_progress(tmp_path: Path) -> None:
    moved = section_limits.MovedBytes()
    child = subprocess.Popen(
        ["dd", "if=/dev/zero", f"of={tmp_path / 'file'}", "bs=1M", "count=9"], stderr=subprocess.DEVNULL
    )
    child.wait()
    assert moved.take() >= 2
    assert moved.take() == 0


# ---- the watchdog itself ---------------------------------------------------------------------------------------------


def test_output_and_storage_that_hang_too_do_not_keep_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, seconds in (
        (launch, "GRACE_S", 0.1),
        (watchdog_module, "SHORTEST_LOOK_S", 0.1),
        (watchdog_module, "STORE_TIMEOUT_S", 0.2),
        (watchdog_module, "WRITE_S", 0.2),
    ):
        monkeypatch.setattr(module, name, seconds)

    def waits(info: RankInfo) -> None:
        del os.environ[FAILURE_FILE]
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(flush=lambda: time.sleep(60)))  # `| less`
        with Watchdog(info, 0.2, rank_status_store(), on_hang=lambda report: time.sleep(60)):  # a log on a dead disk
            time.sleep(60)

    began_s = time.monotonic()
    with pytest.raises(LaunchError, match="rank 0 ended with exit code 1"):
        launch.run_local(waits, 1)
    assert time.monotonic() - began_s < 20


def test_a_long_phase_that_ends_while_the_watchdog_looks_is_no_hang(tmp_path: Path) -> None:
    watchdog = Watchdog(RankInfo(), 30.0, FileStatusStore(tmp_path))

    class Clocks(dict[str, float]):
        def items(self) -> Any:
            found = list(super().items())
            watchdog.heartbeat("step 2: reading data")  # by the other thread
            return found

    watchdog.heartbeat("saving after step 1", may_take_long=True)
    now = time.monotonic()
    watchdog._clocks = Clocks(phase=now - 100, work=now, neighbour=now, store=now)
    assert watchdog._find_hang(now) is None


def test_bytes_are_counted_only_where_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of hundreds of threads takes milliseconds for it."""
    watchdog, counted = Watchdog(RankInfo(), 30.0, FileStatusStore(tmp_path)), []
    monkeypatch.setattr(watchdog._moved, "take", lambda: counted.append(watchdog._status.phase) or 0)
    watchdog.heartbeat("step 1: reading data")
    watchdog._look_at_others()
    watchdog.heartbeat("saving after step 1", may_take_long=True)
    watchdog._look_at_others()
    watchdog.enter_foreign_code("callbacks at the run's end")  # others may wait for it in a long phase
    watchdog._look_at_others()
    assert counted == ["saving after step 1", "callbacks at the run's end"]


def test_a_store_that_is_lost_during_a_report_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog_module, "SHORTEST_LOOK_S", 0.0)
    store = FileStatusStore(tmp_path)
    watchdog = Watchdog(RankInfo(0, 2, 0), 0.01, store)

    def lost(rank: int) -> RankStatus:
        raise RuntimeError("Connection reset")

    monkeypatch.setattr(store, "read", lost)
    watchdog._report(watchdog_module._Hang("a hang", 0.01))
    assert not watchdog._has_reported, "this rank then reports without the others"
