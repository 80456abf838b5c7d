"""Evaluate a model: find it, start ranks or be one of a launcher's, and return the result."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ds.cache import use_writable_caches
from megatron_ds.errors import TopologyError
from megatron_ds.evaluation.report import Evaluation
from megatron_ds.evaluation.setup import Prepared, Settings, device_settings, prepare
from megatron_ds.evaluation.subject import DataSet, Source, Subject, find_subject
from megatron_ds.log import quiet_libraries, setup_logging
from megatron_ds.parallel.consensus import run_on_all_ranks
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RankInfo, rank_from_environment, rank_source

Note = Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    """All that the ranks of an evaluation need."""

    subject: Subject
    sets: Sequence[DataSet]
    settings: Settings
    note: Note


def evaluate(
    path: str | Path,
    data: Source | Sequence[Source] = (),
    *,
    overrides: Sequence[str] = (),
    tp: int | None = None,
    pp: int | None = None,
    nproc: int | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    note: Note = lambda text: None,
) -> Evaluation | None:
    """Compute the loss, perplexity and metrics of a model on data sets.

    Weights alone are read and held: no optimizer, no gradients, no training state. Nothing is written, except the
    tokens of texts to the token cache.

    Under torchrun, the `deepspeed` launcher or srun this process is one rank of their world; alone it starts local
    ranks.

    Args:
        path: see `find_subject`.
        data: data sets, each evaluated on its own; none = the validation data of the run.
        overrides: `key.sub=value` with the keys of a run file, such as `data.seq_length=2048`.
        tp, pp: tensor and pipeline ranks; None = those of the run, or 1.
        nproc: number of local ranks, which data ranks share; None = as few as the layout needs.
        dtype, batch_size: see `Settings`.
        note: called on rank 0 with a line of text before each part.

    Returns:
        the result; None on other ranks of a launcher than the first.

    Raises:
        MegatronDSError: the evaluation is impossible; the message names field, value, rule and fix.
        LaunchError: a rank died; the message has its traceback.
    """
    quiet_libraries()
    use_writable_caches()
    degrees = {"tensor": tp, "pipeline": pp}
    given = [f"parallel.{name}={degree}" for name, degree in degrees.items() if degree is not None]
    subject = find_subject(path, [*overrides, *given])
    sources = [data] if isinstance(data, str | Path | dict) else list(data)
    job = _Job(subject, subject.data_sets(sources), Settings(dtype, batch_size), note)
    info = rank_from_environment()
    if info is None:
        return _start_local(job, nproc)
    if nproc is not None:
        raise TopologyError(
            f"--nproc={nproc} starts local ranks, but a launcher started rank {info.rank} of {info.world_size}; leave "
            f"--nproc out; {rank_source().start_alone()}"
        )
    return _run_launched(job)


def _start_local(job: _Job, nproc: int | None) -> Evaluation:
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not forbid forking
    from megatron_ds.engine import device_type, preload  # not before `quiet_libraries`

    world_size = job.subject.run.parallel.least_ranks if nproc is None else nproc
    prepare(job.subject, job.sets, job.settings, world_size, device_type())
    preload()
    return run_local(lambda info: _run_local_rank(job, info), world_size)[0]


def _run_local_rank(job: _Job, info: RankInfo) -> Evaluation:
    from megatron_ds.engine import start_distributed, stop_distributed

    setup_logging(info.rank)
    torch.set_num_threads(max(1, torch.get_num_threads() // info.world_size))
    device = start_distributed(info, settings=device_settings(job.subject, job.settings))
    found = _run(job, info, device)
    stop_distributed()
    return found


def _run_launched(job: _Job) -> Evaluation | None:
    from megatron_ds.runtime import session

    with session(settings=device_settings(job.subject, job.settings)) as ranks:
        found = _run(job, ranks.info, ranks.device)
    return found if ranks.rank == 0 else None


def _run(job: _Job, info: RankInfo, device: torch.device) -> Evaluation:
    """Evaluate as one of the ranks. Collective over the world."""
    from megatron_ds.evaluation.on_data import evaluate_set, open_sets
    from megatron_ds.runtime.setup import build

    def open_all() -> tuple[Prepared, list]:
        prepared = prepare(job.subject, job.sets, job.settings, info.world_size, device.type)
        return prepared, open_sets(job.subject, job.sets, prepared)

    prepared, opened = run_on_all_ranks(open_all)
    engine = build(prepared.model, prepared.plan, info.rank, device)
    results = []
    for one, data in zip(job.sets, opened):
        if info.rank == 0:
            job.note(f"{one.name}: {data.describe()}")
        results.append(evaluate_set(engine, prepared, one, data))
    layout = prepared.plan.layout
    return Evaluation(
        path=job.subject.path,
        weights=job.subject.weights,
        model_type=prepared.model.hf.family.model_type,
        precision=prepared.plan.summary.precision,
        tp=layout.tensor,
        cp=layout.context,
        pp=layout.pipeline,
        dp=layout.data,
        data=results,
    )
