"""Local ranks: what they return, how failures are told, and that none outlives its job."""

import contextlib
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.errors import DataError, LaunchError
from megatron_ds.parallel import launch
from megatron_ds.parallel.launch import RankInfo, run_local
from tests.ranks import run_ranks


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests whose peers hang, so that the whole grace is waited out."""
    monkeypatch.setattr(launch, "GRACE_S", 0.5)


def test_results_come_in_rank_order_and_ranks_know_their_place() -> None:
    def fn(info: RankInfo) -> Any:
        time.sleep(0.1 * (2 - info.rank))
        return info, os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]

    assert run_local(fn, 3) == [(RankInfo(r, 3, r), str(r), "3", str(r)) for r in range(3)]
    assert "RANK" not in os.environ


def test_a_rank_that_raises_takes_the_others_down_and_is_the_one_told(short_grace: None) -> None:
    def fn(info: RankInfo) -> None:
        if info.rank == 1:
            raise ValueError("broken on purpose")
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"(?s)^rank 1 failed:\nTraceback .*in fn.*ValueError: broken on purpose$"):
        run_local(fn, 3)
    assert time.monotonic() - began < 5


def test_the_cause_is_told_and_not_the_lost_connections_of_its_peers() -> None:
    import torch
    import torch.distributed as dist

    def fn(info: RankInfo) -> None:
        dist.all_reduce(torch.ones(1))
        if info.rank == 1:
            dist.destroy_process_group()  # peers lose this rank before it has told its error
            time.sleep(0.5)
            raise ValueError("broken on purpose")
        dist.all_reduce(torch.ones(1))

    with pytest.raises(LaunchError) as caught:
        run_ranks(fn, 3)
    assert "rank 1 failed" in str(caught.value) and "broken on purpose" in str(caught.value)
    assert "rank 0" not in str(caught.value) and "onnection" not in str(caught.value)


def test_a_killed_rank_is_named_with_its_signal_and_not_its_peers() -> None:
    import torch
    import torch.distributed as dist

    def fn(info: RankInfo) -> None:
        dist.all_reduce(torch.ones(1))
        if info.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))

    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"^rank 1 was killed by SIGKILL, as the kernel does when memory runs out$"):
        run_ranks(fn, 2)
    assert time.monotonic() - began < 30


def test_a_user_error_is_raised_as_it_is_by_the_lowest_rank() -> None:
    def fn(info: RankInfo) -> None:
        time.sleep(0.3 * (2 - info.rank))
        raise DataError(f"row {info.rank}")

    with pytest.raises(DataError, match=r"^row 0$"):
        run_local(fn, 2)


def test_an_error_that_cannot_be_pickled_is_told_by_its_traceback() -> None:
    class Odd(DataError):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def fn(info: RankInfo) -> None:
        raise Odd(1, 2)

    with pytest.raises(LaunchError, match=r"(?s)rank 0 failed:\n.*1 and 2"):
        run_local(fn, 1)


def test_a_result_that_cannot_be_pickled_is_a_failure() -> None:
    with pytest.raises(LaunchError, match=r"(?s)rank 0 failed:.*pickle"):
        run_local(lambda info: threading.Lock(), 1)


def test_sys_exit() -> None:
    def leave(code: Any) -> Callable[[RankInfo], Any]:
        return lambda info: sys.exit(code) if info.rank == 1 else "done"

    assert run_local(leave(0), 2) == ["done", None]
    assert run_local(leave(None), 2) == ["done", None]
    with pytest.raises(LaunchError, match=r"^rank 1 ended with exit code 3$"):
        run_local(leave(3), 2)
    with pytest.raises(LaunchError, match=r"^rank 1 ended with exit code 1$"):
        run_local(leave("text"), 2)


def test_a_rank_that_leaves_early_is_named_when_its_peers_fail() -> None:
    import torch
    import torch.distributed as dist

    def fn(info: RankInfo) -> None:
        dist.all_reduce(torch.ones(1))
        if info.rank == 1:
            sys.exit(0)
        dist.all_reduce(torch.ones(1))

    with pytest.raises(LaunchError, match=r"rank 1 called sys.exit\(0\) while others continued"):
        run_ranks(fn, 2)


def test_time_out_names_the_ranks_that_hang_and_where() -> None:
    def waits_forever(info: RankInfo) -> None:
        if info.rank != 1:
            time.sleep(60)

    with pytest.raises(LaunchError) as caught:
        run_local(waits_forever, 3, timeout_s=0.5)
    message = str(caught.value)
    assert message.startswith("timed out after 0.5 s; ranks still running: 0, 2\nstack of rank 0:\n")
    assert message.count("in waits_forever") == 2


def test_children_of_a_rank_end_with_it(tmp_path: Path, short_grace: None) -> None:
    def fn(info: RankInfo) -> None:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / str(info.rank)).write_text(str(child.pid))
        if info.rank == 1:
            raise ValueError
        if info.rank == 0:
            time.sleep(60)

    with pytest.raises(LaunchError):
        run_local(fn, 3)
    for rank in range(3):
        assert_gone(int((tmp_path / str(rank)).read_text()))


def test_signal_handlers_are_restored_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    run_local(lambda info: None, 2)
    with pytest.raises(LaunchError):
        run_local(lambda info: 1 / 0, 2)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_used_cuda_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(LaunchError, match=r"^this process has used CUDA, .*; try torchrun [^\n]+$"):
        run_local(lambda info: None, 1)


@pytest.mark.parametrize(
    ("cuda", "listed", "devices"), [("13.0", -1, 1), ("13.0", -1, 0), ("13.0", 1, 1), (None, -1, 0)]
)
def test_gpus_that_only_cuda_can_list_forbid_forking(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, listed: int, devices: int
) -> None:
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda._device_count_nvml", lambda: listed)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    if listed < 0 and devices:
        with pytest.raises(LaunchError, match=r"^NVML does not list this machine's GPUs.*; try torchrun [^\n]+$"):
            run_local(lambda info: None, 1)
    else:
        assert run_local(lambda info: info.rank, 1) == [0]


def test_a_rank_whose_parent_had_asked_cuda_is_told_in_one_line() -> None:
    def rank(info: RankInfo) -> None:
        raise RuntimeError(
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must ..."
        )

    with pytest.raises(LaunchError, match=r"^this process has asked CUDA for GPUs, .*; try torchrun [^\n]+$"):
        run_local(rank, 2)


def test_a_fork_beside_threads_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="a-thread")
    thread.start()
    logger = logging.getLogger("megatron_ds")
    logger.addHandler(caplog.handler)
    try:
        assert run_local(lambda info: info.rank, 1) == [0]
    finally:
        logger.removeHandler(caplog.handler)
        stop.set()
        thread.join()
    assert re.search(r"ranks are forked while threads run \([^)]*a-thread\); if one hangs, start", caplog.text)


PARENT = """
import os, signal, sys, time
from pathlib import Path
from megatron_ds.parallel import launch

launch.GRACE_S = 0.5

def fn(info):
    def finish(number, frame):
        time.sleep(info.rank * float(sys.argv[2]))
        Path(sys.argv[1], f"finished{info.rank}").touch()
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, finish)
    Path(sys.argv[1], f"{info.rank}.new").write_text(str(os.getpid()))
    os.rename(Path(sys.argv[1], f"{info.rank}.new"), Path(sys.argv[1], f"pid{info.rank}"))
    time.sleep(60)

try:
    launch.run_local(fn, 2)
except KeyboardInterrupt:
    sys.exit(130)
"""


@contextlib.contextmanager
def parent_of_two(folder: Path, finish_s: float = 0.0) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A process that waits for two ranks, and their pids; rank 1 takes `finish_s` to end after SIGINT."""
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(folder), str(finish_s)], start_new_session=True)
    files = [folder / f"pid{rank}" for rank in range(2)]
    try:
        until = time.monotonic() + 30
        while not all(file.exists() for file in files):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
        yield process, [int(file.read_text()) for file in files]
    finally:
        process.kill()
        process.wait()


def assert_gone(pid: int, within_s: float = 5.0) -> None:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_ranks_end_with_their_parent(tmp_path: Path, number: int, status: int) -> None:
    with parent_of_two(tmp_path) as (parent, pids):
        parent.send_signal(number)
        assert parent.wait(10) == status
        for pid in pids:
            assert_gone(pid)
    assert (tmp_path / "finished0").exists() == (number == signal.SIGINT)


def test_one_interrupt_lets_ranks_finish_even_when_that_takes_longer_than_the_grace_of_a_failure(
    tmp_path: Path,
) -> None:
    with parent_of_two(tmp_path, finish_s=1.5) as (parent, _):
        parent.send_signal(signal.SIGINT)
        assert parent.wait(20) == 130
    assert (tmp_path / "finished0").exists() and (tmp_path / "finished1").exists()


def test_a_second_interrupt_ends_ranks_that_do_not_finish(tmp_path: Path) -> None:
    with parent_of_two(tmp_path, finish_s=50.0) as (parent, pids):
        parent.send_signal(signal.SIGINT)
        time.sleep(launch.SAME_PRESS_S + 0.3)
        assert parent.poll() is None
        parent.send_signal(signal.SIGINT)
        assert parent.wait(10) == 130
        for pid in pids:
            assert_gone(pid)


# ---- a full temporary directory --------------------------------------------------------------------------------------


def lose_the_folder() -> None:
    """Leave the directory of the ranks' files as useless as a full disk does."""
    shutil.rmtree(Path(os.environ[launch.RENDEZVOUS_FILE]).parent)


def test_a_result_needs_no_room_in_the_temporary_directory() -> None:
    def fn(info: RankInfo) -> int:
        lose_the_folder()
        return 7 + info.rank

    assert run_local(fn, 1) == [7]


def test_a_failure_needs_no_room_in_the_temporary_directory() -> None:
    def fn(info: RankInfo) -> None:
        lose_the_folder()
        raise ValueError("broken on purpose")

    with pytest.raises(LaunchError, match=r"(?s)^rank 0 failed:\nTraceback .*ValueError: broken on purpose$"):
        run_local(fn, 1)


def test_a_failure_that_cannot_be_written_anywhere_is_shown() -> None:
    read, write = os.pipe()  # the length of a file is limited too

    def fn(info: RankInfo) -> None:
        sys.stderr = os.fdopen(write, "w")
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
        raise ValueError("broken on purpose")

    with pytest.raises(LaunchError, match=r"^rank 0 ended with exit code 1$"):
        run_local(fn, 1)
    os.close(write)
    with os.fdopen(read) as shown:
        text = shown.read()
    assert (
        "rank 0 failed:\nTraceback" in text and "ValueError: broken on purpose\n" in text and "File too large" in text
    )
