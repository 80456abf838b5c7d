"""Start and supervise local ranks.

`run_local` forks them from this process, which has already imported everything: a rank then starts in a fraction of a
second instead of several. If a rank fails, the others are ended within seconds, and the user sees the traceback of the
rank that failed first. No rank outlives the parent, however the parent ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ds.cache import scratch_directory
from megatron_ds.errors import LaunchError
from megatron_ds.log import flush_streams, get_logger
from megatron_ds.parallel.failure import INTERRUPTED, GroupError, find_cause, read_failure, write_failure
from megatron_ds.parallel.rank_files import FAILURE_FILE, RankFiles
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo

__all__ = ["RENDEZVOUS_FILE", "RankInfo", "run_local"]

POLL_S = 0.02
GRACE_S = 5.0  # from the first failure until the other ranks are ended: time to report their own errors
INTERRUPT_GRACE_S = 60.0  # the same after a signal: time to save, close files and draw the plot
SAME_PRESS_S = 1.0  # a signal may arrive twice, from a scheduler and from a launcher that passes it on
TERM_S = 2.0  # from SIGTERM to SIGKILL
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that stop a run; SIGUSR1 is Slurm's warning (--signal)."""
_PR_SET_PDEATHSIG = 1
_FORK_AFTER_CUDA = "Cannot re-initialize CUDA"  # in torch's error, in a process that was forked after CUDA had started


@dataclass
class _Rank:
    """A forked rank as the parent sees it; `status` is its exit code, or minus the signal that killed it."""

    index: int
    pid: int
    files: RankFiles
    status: int | None = None

    @property
    def running(self) -> bool:
        return self.status is None

    @property
    def failed(self) -> bool:
        return self.status not in (None, 0)


def run_local(fn: Callable[[RankInfo], Any], world_size: int, timeout_s: float | None = None) -> list[Any]:
    """Run `fn` on `world_size` forked ranks of this machine and return what each returned, in rank order.

    The parent must not have started threads or an accelerator. Each rank leads its own process group, so that a Ctrl-C
    reaches the parent alone, which forwards it to the ranks, as it does SIGTERM, SIGUSR1, and SIGHUP if it is not
    ignored. After the first signal the ranks may finish their current work without a time limit, and if all end with
    status 0, this call returns normally. A second signal other than SIGHUP, or one that a rank does not handle, ends
    ranks and parent. A rank that leaves by `sys.exit(0)`
    returns None; if its peers still wait for it, they fail.

    Args:
        fn: called as fn(RankInfo) in each rank; its result is pickled.
        world_size: number of ranks.
        timeout_s: all ranks are ended after this many seconds; None = no limit.

    Raises:
        MegatronDSError: a rank raised it; the error of the lowest such rank.
        LaunchError: a rank died in another way, or the time ran out; with the ranks' own tracebacks or stacks. Or this
            process has used CUDA.
        KeyboardInterrupt: after a Ctrl-C.
        SystemExit: after another signal, if its handler, which is called once more, lets this process live.
    """
    _check_forkable()
    folder = Path(tempfile.mkdtemp(prefix="megatron_ds-", dir=scratch_directory()))
    ranks: list[_Rank] = []
    received: list[int] = []
    try:
        with _passing_on(ranks, received):
            _fork_all(fn, world_size, folder, ranks)
            _supervise(ranks, timeout_s, received)
        return [_result(rank.files.result) for rank in ranks]
    except _Ended as problem:
        ended_by = problem.number
    finally:
        _end(ranks)
        for rank in ranks:
            rank.files.close()
        shutil.rmtree(folder, ignore_errors=True)
    if ended_by == signal.SIGINT:
        raise KeyboardInterrupt
    signal.raise_signal(ended_by)  # the default handler, or the caller's
    raise SystemExit(128 + ended_by)


def handled_stop_signals() -> list[int]:
    """Return those of `STOP_SIGNALS` that a process may handle: not a SIGHUP that is ignored, as nohup has it."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class _Ended(Exception):
    """A signal that ends ranks and parent."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _check_forkable() -> None:
    """Check for threads and CUDA: a fork inherits locks without the threads that hold them, and cannot use CUDA."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise _used_cuda("this process has used CUDA")
    if torch is not None and torch.version.cuda is not None and torch.cuda._device_count_nvml() < 0:
        num_devices = torch.cuda.device_count()  # asks the CUDA driver, which cannot be used after a fork
        if num_devices:
            raise _used_cuda("NVML does not list this machine's GPUs, so this process asked CUDA for them")
    others = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.current_thread())
    if others:
        get_logger().warning("ranks are forked while threads run (%s); if one hangs, start without them", others)


def _used_cuda(cause: str) -> LaunchError:
    return LaunchError(
        f"{cause}, and ranks that are forked from it cannot use CUDA; try torchrun --nproc-per-node N -m megatron_ds, "
        "or a fresh process in which PYTORCH_NVML_BASED_CUDA_CHECK=1 is set and nothing else uses torch.cuda"
    )


def _result(file: Path) -> Any:
    """Read the result of a rank; None if it left by sys.exit(0)."""
    content = file.read_bytes()
    return pickle.loads(content) if content else None


# ---- the parent ------------------------------------------------------------------------------------------------------


@contextmanager
def _passing_on(ranks: Sequence[_Rank], received: list[int]) -> Iterator[None]:
    """Record signals in `received` and forward them to the ranks; only the main thread may set handlers."""

    first_s = 0.0

    def handle(number: int, frame: Any) -> None:
        nonlocal first_s
        now = time.monotonic()
        if not received or (number != signal.SIGHUP and now - first_s > SAME_PRESS_S):
            received.append(number)
            first_s = now
        for rank in ranks:
            if rank.running:
                os.kill(rank.pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in handled_stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fork_all(fn: Callable[[RankInfo], Any], world_size: int, folder: Path, ranks: list[_Rank]) -> None:
    """Fork all ranks with signals blocked, so that a signal finds every rank with its handlers set."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        for index in range(world_size):
            info, files = RankInfo(index, world_size, index), RankFiles(folder, index)
            ranks.append(_Rank(index, _fork(fn, info, folder, files, mask), files))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _supervise(ranks: Sequence[_Rank], timeout_s: float | None, received: Sequence[int]) -> None:
    """Wait until every rank has ended.

    Raises:
        BaseException: the result of `find_cause` after a failure; _Ended after a signal.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    settled: float | None = None
    while any(rank.running for rank in ranks):
        _reap(ranks)
        now = time.monotonic()
        if len(received) > 1:
            raise _Ended(received[-1])
        if settled is None and any(rank.failed for rank in ranks):
            is_finishing = received and not any(rank.status == -number for rank in ranks for number in received)
            settled = now + (INTERRUPT_GRACE_S if is_finishing else GRACE_S)
        if settled is not None and now > settled:
            break
        if settled is None and deadline is not None and now > deadline:
            hung = [rank for rank in ranks if rank.running]
            names = ", ".join(str(rank.index) for rank in hung)
            raise LaunchError(f"timed out after {timeout_s:g} s; ranks still running: {names}\n{_stacks(hung)}")
        time.sleep(POLL_S)
    if not any(rank.failed for rank in ranks):
        return
    if any(rank.status == -number for rank in ranks for number in received):
        raise _Ended(received[0])  # no rank handled it
    cause = _cause(ranks)
    if isinstance(cause, GroupError):
        cause.is_stopping = bool(received)
    raise cause


def _reap(ranks: Sequence[_Rank]) -> None:
    """Record the status of ranks that ended, and end the processes left in their process groups."""
    for rank in ranks:
        if rank.running:
            pid, status = os.waitpid(rank.pid, os.WNOHANG)
            if pid:
                rank.status = os.waitstatus_to_exitcode(status)
                _signal_group(rank.pid, signal.SIGKILL)


def _cause(ranks: Sequence[_Rank]) -> BaseException:
    statuses = {rank.index: rank.status for rank in ranks if rank.status}
    failures = [read_failure(rank.files.failure) for rank in ranks]
    left_early = [rank.index for rank in ranks if rank.status == 0 and not rank.files.result.read_bytes()]
    return find_cause(statuses, [failure for failure in failures if failure is not None], left_early)


def _stacks(ranks: Sequence[_Rank]) -> str:
    """Return the Python stacks of some ranks, as faulthandler writes them."""
    for rank in ranks:
        os.kill(rank.pid, signal.SIGUSR2)
    time.sleep(0.5)
    texts = []
    for rank in ranks:
        text = rank.files.stacks.read_text().rstrip()
        texts.append(f"stack of rank {rank.index}:\n{text or '  (no response)'}")
    return "\n".join(texts)


def _end(ranks: Sequence[_Rank]) -> None:
    """End the remaining ranks and their children: SIGTERM first, SIGKILL after `TERM_S`."""
    for number, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, 5.0)):
        for rank in ranks:
            if rank.running:
                _signal_group(rank.pid, number)
        until = time.monotonic() + wait_s
        while any(rank.running for rank in ranks) and time.monotonic() < until:
            _reap(ranks)
            time.sleep(POLL_S)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # an empty group; on macOS one of zombies
        os.killpg(pid, number)


# ---- the child -------------------------------------------------------------------------------------------------------


def _fork(fn: Callable[[RankInfo], Any], info: RankInfo, folder: Path, files: RankFiles, mask: set[Any]) -> int:
    """Fork a rank that leads its own process group, and return its pid."""
    flush_streams()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may already have ended
            os.setpgid(pid, pid)  # parent and child both call it, so the group exists for both
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        _die_with(parent)
        for number in handled_stop_signals():
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        os.environ.update(_environment(info, folder, files))
        status = _call(fn, info, files, mask)
    finally:
        flush_streams()
        os._exit(status)


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)


def _environment(info: RankInfo, folder: Path, files: RankFiles) -> dict[str, str]:
    environment = {
        "RANK": str(info.rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_RANK": str(info.local_rank),
        "LOCAL_WORLD_SIZE": str(info.world_size),
        RENDEZVOUS_FILE: str(folder / "rendezvous"),
        FAILURE_FILE: str(files.failure),
    }
    environment |= loopback_interfaces()
    return environment


def loopback_interfaces(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables with which gloo and NCCL open no port to other machines, unless `environ` sets them."""
    if sys.platform != "linux":
        return {}
    return {name: environ.get(name, "lo") for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}


def _call(fn: Callable[[RankInfo], Any], info: RankInfo, files: RankFiles, mask: set[Any]) -> int:
    """Call `fn`, write its result or failure, and return the exit status."""
    with open(files.stacks, "w") as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            result = pickle.dumps(fn(info))
        except SystemExit as problem:
            if problem.code is None or isinstance(problem.code, int):
                return problem.code or 0
            sys.stderr.write(f"{problem.code}\n")  # as Python does for sys.exit("text")
            return 1
        except BaseException as problem:
            if _FORK_AFTER_CUDA in str(problem):
                problem = _used_cuda("this process has asked CUDA for GPUs")
            write_failure(files.failure, info.rank, problem)
            return INTERRUPTED if isinstance(problem, KeyboardInterrupt) else 1
        files.result.write_bytes(result)
        return 0
