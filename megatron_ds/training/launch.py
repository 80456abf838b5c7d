"""Start a training run, as one rank under a launcher or by starting local ranks."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_ds.cache import use_writable_caches
from megatron_ds.config import RunConfig
from megatron_ds.errors import ConfigError, LaunchError, MegatronDSError, TopologyError
from megatron_ds.log import flush_streams, get_logger, quiet_libraries, setup_logging
from megatron_ds.monitor import Reporter, SilentReporter
from megatron_ds.parallel.failure import lost_peer
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RankInfo, rank_from_environment, rank_source
from megatron_ds.parallel.restart import run_with_restarts
from megatron_ds.training.graceful_stop import counting_time
from megatron_ds.training.result import TrainResult
from megatron_ds.training.start_log import logging_failure
from megatron_ds.training.supervisor import supervising_local_ranks

if TYPE_CHECKING:
    from megatron_ds.training.callbacks import Callback

ReporterFactory = Callable[[], AbstractContextManager[Reporter]]

SECONDARY_ERROR_DELAY_S = 8.0  # the launcher kills the peers of a failed rank before they log secondary errors


_AsRank = Callable[[RunConfig, RankInfo, Sequence[str]], TrainResult]
"""(run, this rank, lines on what the planner chose) -> result."""


def silent() -> AbstractContextManager[Reporter]:
    """Return a reporter that shows nothing; `metrics.jsonl` has all metrics."""
    return nullcontext(SilentReporter())


@dataclass(frozen=True)
class Restarts:
    """Restart policy for local ranks that die.

    Attributes:
        at_most: maximum number of restarts from the last checkpoint.
        min_ranks: minimum number of ranks to continue with after ranks were lost; None = always restart all of them.
    """

    at_most: int = 0
    min_ranks: int | None = None


def train(
    run: RunConfig,
    nproc: int | None = None,
    reporter: ReporterFactory = silent,
    restarts: Restarts = Restarts(),
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a run.

    Under torchrun, the `deepspeed` launcher or srun this process is one rank of their world. Alone it starts `nproc`
    local ranks and waits for them; an invalid run is rejected before they start.

    Args:
        run: from `load_run`.
        nproc: number of local ranks; None = 1, or the launcher's number.
        reporter: opened on rank 0 only.
        restarts: restart policy of local ranks.
        callbacks: called after those that the run file names; each rank has a copy of its own.

    Returns:
        steps, losses and paths; the same on every rank.

    Raises:
        MegatronDSError: the run is invalid, or fails in a way that the user can fix.
        LaunchError: a rank died; the message has its traceback.
        KeyboardInterrupt: after a Ctrl-C, once every rank has finished its step and the files are closed.
    """
    quiet_libraries()
    use_writable_caches()

    def as_rank(run: RunConfig, info: RankInfo, notes: Sequence[str]) -> TrainResult:
        return _train_as(run, info, reporter, callbacks, notes)

    if nproc is not None and nproc < 1:
        raise TopologyError(f"--nproc={nproc} is less than one rank; nearest: 1")
    given = rank_from_environment()
    if given is None:
        return _train_locally(run, nproc or 1, as_rank, restarts)
    if restarts.at_most:
        raise TopologyError(
            f"--max-restarts={restarts.at_most} restarts local ranks, but a launcher started rank {given.rank} of "
            f"{given.world_size}; try torchrun --max-restarts or sbatch --requeue; {rank_source().start_alone()}"
        )
    if nproc is not None:
        raise TopologyError(
            f"--nproc={nproc} starts local ranks, but a launcher started rank {given.rank} of {given.world_size}; "
            f"leave --nproc out; {rank_source().start_alone()}"
        )
    return _train_launched(run, given, as_rank)


def _train_locally(run: RunConfig, ranks: int, as_rank: _AsRank, restarts: Restarts) -> TrainResult:
    check_restarts(run, ranks, restarts)
    share_cores(ranks)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not forbid forking

    from megatron_ds.engine import device_count, device_type, preload
    from megatron_ds.training.automatic import with_choices
    from megatron_ds.training.model_paths import with_pinned_models
    from megatron_ds.training.resolve import resolve_run

    check_devices(ranks, device_type(), device_count())
    run = with_pinned_models(run)
    chosen = {ranks: with_choices(run, ranks, device_type())}
    resolve_run(chosen[ranks].run, ranks, device_type())
    preload(run.train.compile)
    resumed = run.model_copy(update={"checkpoint": run.checkpoint.model_copy(update={"resume": "auto"})})

    results: list[TrainResult] = []

    def start(count: int, is_restart: bool) -> None:
        if count not in chosen:  # ranks were lost
            chosen[count] = with_choices(run, count, device_type())
        choice = chosen[count]
        with logging_failure(Path(run.output)):
            results[:] = run_local(lambda info: as_rank(choice.run, info, choice.notes), count)

    def misfit(count: int) -> str | None:
        """Return why the run does not fit a number of ranks; None = it fits."""
        try:
            resolve_run(with_choices(resumed, count, device_type()).run, count, device_type())
        except ConfigError as problem:
            return str(problem)
        has_devices = device_type() == "cpu" or count <= device_count()
        return None if has_devices else f"there are {device_count()} devices"

    def fewer(left: int) -> int | None:
        assert restarts.min_ranks is not None
        return next((count for count in range(left, restarts.min_ranks - 1, -1) if misfit(count) is None), None)

    if restarts.min_ranks is not None and restarts.min_ranks < ranks and fewer(ranks - 1) is None:
        raise TopologyError(
            f"--min-nproc={restarts.min_ranks}: the run fits none of {restarts.min_ranks} to {ranks - 1} ranks (with "
            f"{restarts.min_ranks}: {misfit(restarts.min_ranks)}); try --min-nproc={ranks}"
        )
    with counting_time(), supervising_local_ranks() if restarts.at_most else nullcontext():
        run_with_restarts(start, ranks, restarts.at_most, fewer if restarts.min_ranks is not None else None)
    return results[0]


def check_restarts(run: RunConfig, ranks: int, restarts: Restarts) -> None:
    """Check that a restart policy fits the run.

    Raises:
        ConfigError: the run saves no checkpoints to restart from.
        TopologyError: the minimum number of ranks is out of range.
    """
    if restarts.at_most and not run.checkpoint.every:
        raise ConfigError(
            f"--max-restarts={restarts.at_most} restarts from a checkpoint, and checkpoint.every=0 saves none; try "
            "checkpoint.every=100"
        )
    if restarts.min_ranks is None:
        return
    if not 1 <= restarts.min_ranks <= ranks:
        raise TopologyError(f"--min-nproc={restarts.min_ranks} is not between 1 and --nproc={ranks}; nearest: {ranks}")
    if not restarts.at_most:
        raise TopologyError(
            f"--min-nproc={restarts.min_ranks} has no effect without --max-restarts; try --max-restarts=1"
        )


def share_cores(nproc: int | None) -> None:
    """Divide this machine's cores among local ranks, where the environment does not. Call it before importing torch.

    torchrun sets the number of threads itself, the `deepspeed` launcher sets the number of local ranks, and srun leaves
    both to the user.

    Args:
        nproc: number of local ranks that this process starts; None = one, or a launcher started them.
    """
    local_ranks = nproc or int(os.environ.get("LOCAL_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_ranks)))


def check_devices(ranks: int, device_type: str, count: int) -> None:
    """Check that each local rank has its own device; on CPU ranks share it.

    Raises:
        TopologyError: there are too few devices.
    """
    if device_type != "cpu" and ranks > count:
        raise TopologyError(f"--nproc={ranks} is more than the {count} {device_type} devices here; nearest: {count}")


def _train_launched(run: RunConfig, info: RankInfo, as_rank: _AsRank) -> TrainResult:
    """Train as one of a launcher's ranks; log why this rank failed, late if it failed because a peer did."""
    share_cores(None)
    try:
        return as_rank(run, info, ())
    except MegatronDSError as problem:
        if info.rank == 0:
            raise
        get_logger().error("error: %s", problem)
        _leave(1 if isinstance(problem, LaunchError) else 2)
    except Exception as problem:
        if lost_peer(problem):
            time.sleep(SECONDARY_ERROR_DELAY_S)
        get_logger().error("%s", traceback.format_exc().rstrip())
        _leave(1)


def _leave(status: int) -> NoReturn:
    """End the process without destroying its process group, which could wait for the peers forever."""
    flush_streams()
    os._exit(status)


def _train_as(
    run: RunConfig,
    info: RankInfo,
    reporter: ReporterFactory,
    callbacks: Sequence[Callback],
    notes: Sequence[str],
) -> TrainResult:
    from megatron_ds.training.worker import train_rank

    setup_logging(info.rank)
    with reporter() if info.rank == 0 else silent() as opened:
        return train_rank(run, info, opened, callbacks, notes)
