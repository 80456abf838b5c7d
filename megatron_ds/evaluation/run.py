"""Evaluate a model: find it and what it is evaluated on, start ranks or be one of a launcher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ds.cache import use_writable_caches
from megatron_ds.errors import ConfigError, TopologyError
from megatron_ds.evaluation.task_choice import Tasks
from megatron_ds.log import quiet_libraries
from megatron_ds.parallel.rank_info import rank_from_environment, rank_source

if TYPE_CHECKING:
    from megatron_ds.evaluation.report import Evaluation
    from megatron_ds.evaluation.subject import Source

Note = Callable[[str], None]


def evaluate(
    path: str | Path,
    data: Source | Sequence[Source] = (),
    *,
    tasks: Tasks | Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    tp: int | None = None,
    pp: int | None = None,
    nproc: int | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    note: Note = lambda text: None,
) -> Evaluation | None:
    """Compute the loss, perplexity and metrics of a model on data sets, or its scores on tasks of lm-eval.

    Weights alone are read and held: no optimizer, no gradients, no training state. Nothing is written, except the
    tokens of texts to the token cache.

    Under torchrun, the `deepspeed` launcher or srun this process is one rank of their world; alone it starts local
    ranks.

    Args:
        path: see `find_subject`.
        data: data sets, each evaluated on its own; none = the validation data of the run.
        tasks: tasks, or their names, instead of data sets.
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
    from megatron_ds.evaluation.job import Job, run_launched, start_local  # not before `quiet_libraries`
    from megatron_ds.evaluation.setup import Settings
    from megatron_ds.evaluation.subject import find_subject

    degrees = {"tensor": tp, "pipeline": pp}
    given = [f"parallel.{name}={degree}" for name, degree in degrees.items() if degree is not None]
    subject = find_subject(path, [*overrides, *given])
    sources = [data] if isinstance(data, str | Path | dict) else list(data)
    if tasks is not None and sources:
        raise ConfigError("--data and --tasks are both given; choose one, and start a second evaluation for the other")
    sets = subject.data_sets(sources) if tasks is None else []
    chosen = tasks if isinstance(tasks, Tasks | None) else Tasks(tuple(tasks))
    job = Job(subject, sets, chosen, Settings(dtype, batch_size), note)
    info = rank_from_environment()
    if info is None:
        return start_local(job, nproc)
    if nproc is not None:
        raise TopologyError(
            f"--nproc={nproc} starts local ranks, but a launcher started rank {info.rank} of {info.world_size}; leave "
            f"--nproc out; {rank_source().start_alone()}"
        )
    return run_launched(job)
