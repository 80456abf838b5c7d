"""An evaluation on its ranks: local ones, or those of a launcher."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from megatron_ds.data import Dataset
from megatron_ds.engine import device_type, preload, start_distributed, stop_distributed
from megatron_ds.evaluation.likelihood_head import with_likelihoods
from megatron_ds.evaluation.on_data import evaluate_set, open_sets
from megatron_ds.evaluation.report import Evaluation
from megatron_ds.evaluation.setup import Prepared, Settings, device_settings, prepare
from megatron_ds.evaluation.subject import DataSet, Subject
from megatron_ds.evaluation.task_choice import Tasks
from megatron_ds.evaluation.tasks import check_model, run_tasks
from megatron_ds.log import setup_logging
from megatron_ds.parallel.agreement import Facts
from megatron_ds.parallel.consensus import run_on_all_ranks
from megatron_ds.parallel.launch import run_local
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.watchdog import PEER_TIMEOUT_S, watch_peers
from megatron_ds.runtime import session
from megatron_ds.runtime.file_facts import flatten
from megatron_ds.runtime.rank_facts import run_facts, section_facts
from megatron_ds.runtime.setup import build

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class Job:
    """All that the ranks of an evaluation need.

    Attributes:
        subject: the model.
        sets: the data sets; none where tasks are evaluated.
        tasks: the tasks; None where data sets are evaluated.
        settings: precision and batch size.
        note: called on rank 0 with a line of text before each part.
        manager: what finds the tasks; None = rank 0 makes it.
    """

    subject: Subject
    sets: Sequence[DataSet]
    tasks: Tasks | None
    settings: Settings
    note: Callable[[str], None]
    manager: TaskManager | None = None

    def prepare(self, world_size: int, device_type: str) -> Prepared:
        """Check the evaluation; see `setup.prepare`."""
        if self.tasks is None:
            return prepare(self.subject, self.sets, self.settings, world_size, device_type)
        found = prepare(self.subject.without_sequence(), (), self.settings, world_size, device_type, with_likelihoods)
        check_model(found.model)
        return found


def start_local(job: Job, nproc: int | None) -> Evaluation:
    """Evaluate on local ranks.

    Args:
        job: the evaluation.
        nproc: number of ranks; None = as few as the layout needs.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for GPUs must not forbid forking
    world_size = job.subject.run.parallel.least_ranks if nproc is None else nproc
    job.prepare(world_size, device_type())
    job = replace(job, manager=job.tasks.manager() if job.tasks is not None else None)
    preload()
    found: Evaluation = run_local(lambda info: _run_local_rank(job, info), world_size)[0]
    return found


def _run_local_rank(job: Job, info: RankInfo) -> Evaluation:
    setup_logging(info.rank)
    torch.set_num_threads(max(1, torch.get_num_threads() // info.world_size))
    with watch_peers(info):
        device = start_distributed(info, settings=device_settings(job.subject, job.settings))
        found = _run(job, info, device)
        stop_distributed()
    return found


def run_launched(job: Job) -> Evaluation | None:
    """Evaluate as one of a launcher's ranks; the first returns the result. Collective over the world."""
    settings = device_settings(job.subject, job.settings)
    with session(settings=settings, facts=lambda: _facts(job), peer_timeout_s=PEER_TIMEOUT_S) as ranks:
        found = _run(job, ranks.info, ranks.device)
    return found if ranks.rank == 0 else None


def _facts(job: Job) -> Facts:
    """Return what must be the same on every rank of a launcher."""
    tasks = None if job.tasks is None else asdict(job.tasks)
    command = {"--data": [one.name for one in job.sets], "--tasks": tasks, **asdict(job.settings)}
    data = {name: value for one in job.sets for name, value in section_facts(one.section).items()}
    return {**run_facts(job.subject.run, None), "command": dict(flatten("", command)), "data": data}


def _run(job: Job, info: RankInfo, device: torch.device) -> Evaluation:
    """Evaluate as one of the ranks. Collective over the world."""

    def open_all() -> tuple[Prepared, list[Dataset], TaskManager | None]:
        prepared = job.prepare(info.world_size, device.type)
        makes_manager = job.tasks is not None and job.manager is None and info.rank == 0
        manager = job.tasks.manager() if job.tasks is not None and makes_manager else job.manager
        return prepared, open_sets(job.subject, job.sets, prepared) if job.sets else [], manager

    prepared, opened, manager = run_on_all_ranks(open_all)
    engine, note = build(prepared.model, prepared.plan, info.rank, device), job.note if info.rank == 0 else _silent
    results, scores = [], None
    for one, data in zip(job.sets, opened):
        note(f"{one.name}: {data.describe()}")
        results.append(evaluate_set(engine, prepared, one, data))
    if job.tasks is not None:
        scores = run_tasks(engine, prepared.model, job.tasks, manager, job.settings.batch_size, note)
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
        tasks=scores,
    )


def _silent(text: str) -> None:
    """Drop a note."""
