"""One rank's part of a training run."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from megatron_ds.config import RunConfig, check_target_length
from megatron_ds.data import Dataset, GlobalBatches, collate, for_data_rank, open_dataset, ordered_pass
from megatron_ds.engine import (
    Engine,
    EngineOptions,
    StepResult,
    build_engine,
    device_type,
    start_distributed,
    stop_distributed,
)
from megatron_ds.models.build import model_stages
from megatron_ds.monitor import Reporter, StepMetrics, Throughput, ValidMetrics
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import create_grid
from megatron_ds.parallel.rank import RankInfo
from megatron_ds.train.export import check_export, export_live
from megatron_ds.train.interrupt import Interrupt
from megatron_ds.train.job import Job, resolve
from megatron_ds.train.output import RunOutput
from megatron_ds.train.schedule import learning_rate
from megatron_ds.train.summary import flops_per_position, positions_of, summarize
from megatron_ds.train.together import together


def train_rank(run: RunConfig, info: RankInfo, reporter: Reporter) -> None:
    """Train as one rank of a job: join the others, check and read data together, train, export.

    After an exception the process group is left as it is: taking NCCL down waits for peers, which may be waiting for
    this rank. The process is expected to end.

    Raises:
        MegatronDSError: what the user can mend; see `together` for which rank raises it.
        KeyboardInterrupt: after SIGINT, once every rank has finished its step and the files are closed.
    """
    device = start_distributed(info)
    prepared = together(lambda: _prepare(run, info))
    is_complete = _train(prepared, _build(prepared.job, info, device), reporter)
    stop_distributed()
    if not is_complete:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class _Prepared:
    job: Job
    train_data: Dataset
    valid_data: Dataset | None


def _prepare(run: RunConfig, info: RankInfo) -> _Prepared:
    """Everything that can be refused: the run against model and world, and its data."""
    job = resolve(run, info.world_size, device_type())
    return _Prepared(job, _open(job, "train"), _open(job, "valid") if run.data.valid else None)


def _open(job: Job, split: str) -> Dataset:
    data = job.run.data
    found = open_dataset(
        data.format,
        job.objective,
        [source.path for source in getattr(data, split)],
        data.seq_length,
        job.model.core.vocab_size,
        job.run.model.tokenizer_path,
        data.cache_dir,
    )
    check_target_length(job.run, found.target_length)
    return found


def _build(job: Job, info: RankInfo, device: torch.device) -> Engine:
    run = job.run
    options = EngineOptions(job.deepspeed, run.optimizer, run.parallel.sequence, run.train.recompute, run.train.seed)
    grid = create_grid(job.layout, info.rank)
    read_share = job.weights.share if job.weights is not None else None
    return build_engine(lambda at: model_stages(job.model.core, at), grid, device, options, read_share)


def _train(prepared: _Prepared, engine: Engine, reporter: Reporter) -> bool:
    """Train and export; returns False if interrupted, the same on every rank."""
    job, run = prepared.job, prepared.job.run
    summary = summarize(job, engine, prepared.train_data)
    with RunOutput(run, reporter, is_first=engine.grid.rank == 0) as output:
        output.start(summary)
        flops = flops_per_position(job, summary.num_params, prepared.train_data)
        throughput = Throughput(flops, job.layout.world_size)
        loop = TrainingLoop(run, engine, prepared.train_data, prepared.valid_data, output, throughput)
        with Interrupt() as interrupt:
            done = loop.run(interrupt)
            output.close(job.model.family.model_type)
        if done < run.train.steps:
            output.finish(f"interrupted after step {done} of {run.train.steps}; metrics are in {run.output}")
            return False
        _export(job, engine, prepared.train_data, output)
        output.finish(f"done: {run.train.steps} steps; metrics and loss.png are in {run.output}")
        return True


def _export(job: Job, engine: Engine, data: Dataset, output: RunOutput) -> None:
    section = job.run.export
    if section is None:
        return
    export_live(engine, job, section)
    output.note(f"exported a Hugging Face directory: {section.path}")
    if section.check:
        batch = collate(data, range(job.run.train.micro_batch_size))
        error = check_export(engine, job, section, batch)
        output.note(f"what transformers predicts from it equals the live model's: relative error {error:.1e}")


class TrainingLoop:
    """Step after step, with a validation now and then.

    Args:
        run: how many steps, in what batches, at what rate.
        engine: does a step.
        train_data: whose samples' order depends on seed and step alone, never on the layout.
        valid_data: None = no validation.
        output: is told of every logged step.
        throughput: counts positions, G * S a step, with an encoder-decoder's targets G * (S + T): the work done,
            padding included. `tokens` and `tokens_per_s` in the metrics count labelled tokens: what was learned from.
    """

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        train_data: Dataset,
        valid_data: Dataset | None,
        output: RunOutput,
        throughput: Throughput,
    ) -> None:
        self._run, self._engine, self._output, self._throughput = run, engine, output, throughput
        self._train_data, self._valid_data = train_data, valid_data
        self._batches = GlobalBatches(len(train_data), run.train.global_batch_size, run.train.seed, run.data.shuffle)
        self._applied = 0  # optimizer steps that were not skipped: what the schedule goes by

    def run(self, interrupt: Interrupt) -> int:
        """Train until the last step or an interrupt; returns the number of steps done, the same on every rank."""
        steps = self._run.train.steps
        for step in range(1, steps + 1):
            self._step(step)
            if self._is_validation_due(step):
                self._validate(step)
            if self._any_rank(interrupt.requested):
                return step
        return steps

    def _step(self, step: int) -> None:
        """One optimizer step; its seconds cover the reading of its data."""
        began_s = time.perf_counter()
        lr = learning_rate(self._applied, self._run.train.steps, self._run.optimizer, self._run.schedule)
        result = self._engine.train_step(self._micro_batches(self._train_data, self._batches.indices(step - 1)), lr)
        self._applied += result.applied
        if step % self._run.train.log_every == 0 or step in (1, self._run.train.steps):
            self._output.step(self._metrics(step, lr, result, time.perf_counter() - began_s))
        self._output.watch(step, result.loss)

    def _metrics(self, step: int, lr: float, result: StepResult, step_s: float) -> StepMetrics:
        positions = self._run.train.global_batch_size * positions_of(self._train_data)
        return StepMetrics(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=result.tokens,
            step_s=step_s,
            tokens_per_s=result.tokens / step_s,
            tflops_per_rank=self._throughput.rates(positions, step_s).tflops_per_rank,
            terms=result.terms if len(result.terms) > 1 else {},
        )

    def _is_validation_due(self, step: int) -> bool:
        every = self._run.train.eval_every
        return self._valid_data is not None and every > 0 and (step % every == 0 or step == self._run.train.steps)

    def _validate(self, step: int) -> None:
        """The loss of the whole validation set; the last batch is filled up without labels."""
        data, size = self._valid_data, self._run.train.global_batch_size
        assert data is not None
        batches = (self._micro_batches(data, indices) for indices in ordered_pass(len(data), size))
        losses = reduce(operator.add, map(self._engine.evaluate, batches))
        self._output.valid(ValidMetrics(step, losses.mean))

    def _micro_batches(self, data: Dataset, indices: Sequence[int] | np.ndarray) -> list[dict[str, torch.Tensor]]:
        axis = self._engine.grid.data
        parts = for_data_rank(indices, axis.rank, axis.size, self._run.train.micro_batch_size)
        return [collate(data, part) for part in parts]

    def _any_rank(self, flag: bool) -> bool:
        """Whether it is set on any rank, so that all leave the loop after the same step."""
        count = torch.tensor(int(flag), device=self._engine.device)
        return bool(all_reduce_(count, self._engine.grid.world))
