"""Who am I among the ranks, and how to start local ones.

Under torchrun, the `deepspeed` launcher or srun the answer is in the environment. Alone, `run_local` forks N ranks from
this process, which has imported everything already: a rank then starts in a fraction of a second instead of many.
A rank that fails takes the others down; its own traceback is what the user sees.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ds.errors import LaunchError, MegatronDSError, TopologyError

RENDEZVOUS_FILE = "MEGATRON_DS_RENDEZVOUS"
GRACE_S = 5.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RankInfo:
    """This process's place in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def rank_from_environment(environ: Mapping[str, str] = os.environ) -> RankInfo | None:
    """The place that torchrun, the `deepspeed` launcher or srun gave this process; None when started alone.

    srun sets no MASTER_ADDR; the first host of the job and a port made of its id are taken where it is unset.

    Raises:
        TopologyError: some of the variables are there and others missing.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in environ]
    if len(given) == len(names):
        return RankInfo(*(int(environ[name]) for name in names))
    if given:
        missing = ", ".join(name for name in names if name not in environ)
        raise TopologyError(
            f"{', '.join(given)} set but {missing} missing in the environment; use torchrun, or unset all"
        )
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        _slurm_rendezvous(environ)
        return RankInfo(*(int(environ[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")))
    return None


def _slurm_rendezvous(environ: Mapping[str, str]) -> None:
    if "MASTER_ADDR" not in environ:
        nodes = environ["SLURM_JOB_NODELIST"]
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
    if "MASTER_PORT" not in environ:
        os.environ["MASTER_PORT"] = str(20000 + int(environ["SLURM_JOB_ID"]) % 20000)


@dataclass
class _Rank:
    pid: int
    status: int | None = None
    folder: Path = field(default_factory=Path)

    @property
    def failed(self) -> bool:
        return self.status not in (None, 0)


def run_local(fn: Callable[[RankInfo], Any], world_size: int, timeout_s: float | None = None) -> list[Any]:
    """Run `fn` on `world_size` forked ranks of this machine and return what each returned, in rank order.

    The parent must not have started threads or an accelerator. Each child is in a process group of its own, so a
    Ctrl-C reaches the parent alone, which passes it on once.

    Args:
        fn: called as fn(RankInfo) in each child; its result is pickled.
        world_size: number of ranks.
        timeout_s: end all ranks after this long.

    Raises:
        MegatronDSError: a rank raised it; the same error, of the lowest rank that did.
        LaunchError: a rank died otherwise, or the time ran out; with the rank's own traceback.
    """
    folder = Path(tempfile.mkdtemp(prefix="megatron_ds-"))
    ranks = [_fork(fn, RankInfo(rank, world_size, rank), folder) for rank in range(world_size)]
    forward = {number: signal.signal(number, _passing_on(ranks)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _supervise(ranks, timeout_s)
        return [_result(folder / f"{rank}.result") for rank in range(world_size)]
    finally:
        _end(ranks)
        for number, handler in forward.items():
            signal.signal(number, handler)
        shutil.rmtree(folder, ignore_errors=True)


def _result(file: Path) -> Any:
    """What a rank returned; None where it left by sys.exit(0)."""
    return pickle.loads(file.read_bytes()) if file.is_file() else None


def _passing_on(ranks: list[_Rank]) -> Callable[[int, Any], None]:
    def handler(number: int, frame: Any) -> None:
        for rank in ranks:
            if rank.status is None:
                os.kill(rank.pid, number)

    return handler


def _fork(fn: Callable[[RankInfo], Any], info: RankInfo, folder: Path) -> _Rank:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return _Rank(pid, folder=folder)
    status = 1
    try:
        os.setpgid(0, 0)
        if sys.platform == "linux":  # die with the parent, even if it is killed
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update(_rank_environment(info, folder))
        status = _call(fn, info, folder)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _rank_environment(info: RankInfo, folder: Path) -> dict[str, str]:
    environment = {
        "RANK": str(info.rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_RANK": str(info.local_rank),
        "LOCAL_WORLD_SIZE": str(info.world_size),
        RENDEZVOUS_FILE: str(folder / "rendezvous"),
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _call(fn: Callable[[RankInfo], Any], info: RankInfo, folder: Path) -> int:
    with open(folder / f"{info.rank}.stacks", "w") as stacks:
        faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
        try:
            result = pickle.dumps(fn(info))
        except BaseException as problem:
            if isinstance(problem, SystemExit) and isinstance(problem.code, int):
                return problem.code
            content = (time.time(), problem if isinstance(problem, MegatronDSError) else None, traceback.format_exc())
            (folder / f"{info.rank}.error").write_bytes(pickle.dumps(content))
            return 130 if isinstance(problem, KeyboardInterrupt) else 1
        (folder / f"{info.rank}.result").write_bytes(result)
        return 0


def _supervise(ranks: list[_Rank], timeout_s: float | None) -> None:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while any(rank.status is None for rank in ranks):
        _reap(ranks)
        if any(rank.failed for rank in ranks):
            break
        if deadline is not None and time.monotonic() > deadline:
            hung = [index for index, rank in enumerate(ranks) if rank.status is None]
            raise LaunchError(f"no end after {timeout_s:g} s; still running: ranks {hung}\n{_stacks(ranks, hung)}")
        time.sleep(0.02)
    if any(rank.failed for rank in ranks):
        # The first to fail is the cause; peers often fail after it, of lost connections.
        settle = time.monotonic() + GRACE_S
        while any(rank.status is None for rank in ranks) and time.monotonic() < settle:
            _reap(ranks)
            time.sleep(0.02)
        raise _explain(ranks)


def _reap(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if rank.status is None:
            pid, status = os.waitpid(rank.pid, os.WNOHANG)
            if pid:
                rank.status = os.waitstatus_to_exitcode(status)


def _explain(ranks: list[_Rank]) -> BaseException:
    if any(rank.status == 130 for rank in ranks):
        return KeyboardInterrupt()
    killed = [
        f"rank {index} was killed by {signal.Signals(-rank.status).name}"
        for index, rank in enumerate(ranks)
        if rank.status is not None and rank.status < 0
    ]
    errors = []
    for index, rank in enumerate(ranks):
        file = rank.folder / f"{index}.error"
        if file.is_file():
            when, known, text = pickle.loads(file.read_bytes())
            errors.append((when, index, known, text))
    if killed:
        return LaunchError("; ".join(killed))
    for _, _, known, _ in sorted(errors, key=lambda error: error[1]):
        if known is not None:
            return known
    if errors:
        _, index, _, text = min(errors, key=lambda error: error[0])
        return LaunchError(f"rank {index} failed:\n{text.rstrip()}")
    codes = {index: rank.status for index, rank in enumerate(ranks) if rank.failed}
    return LaunchError(f"ranks ended with exit codes {codes}")


def _stacks(ranks: list[_Rank], which: list[int]) -> str:
    """Where each of some ranks stands, by faulthandler."""
    for index in which:
        os.kill(ranks[index].pid, signal.SIGUSR2)
    time.sleep(0.5)
    texts = []
    for index in which:
        file = ranks[index].folder / f"{index}.stacks"
        text = file.read_text() if file.is_file() else ""
        texts.append(f"rank {index} stood at:\n{text.rstrip()}")
    return "\n".join(texts)


def _end(ranks: list[_Rank]) -> None:
    """Ask the remaining ranks to stop, then make them; each with its own children."""
    for number, wait_s in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        running = [rank for rank in ranks if rank.status is None]
        for rank in running:
            _signal_with_children(rank.pid, number)
        until = time.monotonic() + wait_s
        while any(rank.status is None for rank in running) and time.monotonic() < until:
            _reap(running)
            time.sleep(0.02)


def _signal_with_children(pid: int, number: int) -> None:
    """Signal a rank's process group; the rank alone where it has not made its group yet."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        os.kill(pid, number)
