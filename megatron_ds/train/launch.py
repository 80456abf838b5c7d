"""Start a training run: as the rank that a launcher made of this process, or with local ranks of our own."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from megatron_ds.config import RunConfig
from megatron_ds.errors import TopologyError
from megatron_ds.log import setup_logging
from megatron_ds.monitor import Reporter, SilentReporter
from megatron_ds.parallel.launch import RankInfo, rank_from_environment, run_local


def train(
    run: RunConfig,
    nproc: int | None = None,
    reporter: Callable[[], AbstractContextManager[Reporter]] = lambda: nullcontext(SilentReporter()),
) -> None:
    """Train a run.

    Under torchrun, the `deepspeed` launcher or srun this process is one rank of their world. Alone it starts `nproc`
    local ranks and waits for them; anything wrong with the run is refused first.

    Args:
        run: from `load_run`.
        nproc: local ranks; None = 1, or what the launcher says.
        reporter: opened on rank 0 only.

    Raises:
        MegatronDSError: what the user can mend.
        LaunchError: a rank died; with its traceback.
    """
    given = rank_from_environment()
    if given is not None:
        if nproc is not None:
            raise TopologyError(
                f"--nproc={nproc} is for starting alone, but a launcher set WORLD_SIZE={given.world_size}; "
                f"leave --nproc out"
            )
        _train_as(run, given, reporter)
        return
    ranks = nproc or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not forbid forking

    from megatron_ds.engine import device_type, preload
    from megatron_ds.train.job import resolve

    resolve(run, ranks, device_type())
    preload()
    run_local(lambda info: _train_as(run, info, reporter), ranks)


def _train_as(run: RunConfig, info: RankInfo, reporter: Callable[[], AbstractContextManager[Reporter]]) -> None:
    from megatron_ds.train.loop import train_rank

    setup_logging(info.rank)
    with reporter() if info.rank == 0 else nullcontext(SilentReporter()) as listening:
        train_rank(run, info, listening)
