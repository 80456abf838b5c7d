"""One rank's part of a training run."""

from __future__ import annotations

import math
import operator
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_ds import __version__
from megatron_ds.checkpoint.folder import name_of
from megatron_ds.checkpoint.load import load_state
from megatron_ds.checkpoint.progress import Origin, Progress
from megatron_ds.checkpoint.reader import Found, StateReader
from megatron_ds.checkpoint.saver import Saved, SaveOptions, Saver
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
from megatron_ds.errors import TrainingError
from megatron_ds.models.build import model_stages
from megatron_ds.monitor import Reporter, StepMetrics, Throughput, ValidMetrics
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import create_grid
from megatron_ds.parallel.rank import RankInfo
from megatron_ds.train.export import check_export, export_live
from megatron_ds.train.interrupt import Interrupt
from megatron_ds.train.job import Job, resolve
from megatron_ds.train.output import RunOutput
from megatron_ds.train.resume import begin, check_found, clear_way, find, folder_of
from megatron_ds.train.schedule import learning_rate
from megatron_ds.train.summary import flops_per_position, positions_of, summarize
from megatron_ds.train.together import together
from megatron_ds.train.watchdog import Watchdog, board_of

COLLECTIVE_TIMEOUT_S = 1800.0  # of a collective, at least: the watchdog, which says more, comes first
_CLOCK = 1  # beside the numbers of signals, of which 1, SIGHUP, is none that stops a run


def train_rank(run: RunConfig, info: RankInfo, reporter: Reporter) -> None:
    """Train as one rank of a job: join the others, check and read data together, resume, train, export.

    After an exception the process group is left as it is: taking NCCL down waits for peers, which may be waiting for
    this rank. The process is expected to end.

    Raises:
        MegatronDSError: what the user can mend; see `together` for which rank raises it.
        KeyboardInterrupt: after SIGINT, once every rank has finished its step, saved, and closed the files.
    """
    with Interrupt(run.train.max_time) as interrupt:
        device = start_distributed(info, timeout_s=max(COLLECTIVE_TIMEOUT_S, 2 * run.train.step_timeout))
        found = find(run, info)
        prepared = together(lambda: _prepare(run, info, found))
        engine = _build(prepared.job, info, device)
        with Watchdog(info, run.train.step_timeout, board_of(info)) as watchdog:
            was_interrupted = _train(prepared, engine, reporter, interrupt, watchdog)
        stop_distributed()
    if was_interrupted:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class _Prepared:
    job: Job
    train_data: Dataset
    valid_data: Dataset | None
    begin: Progress
    reader: StateReader | None
    notes: tuple[str, ...]


def _prepare(run: RunConfig, info: RankInfo, found: Found) -> _Prepared:
    """Everything that can be refused: the run against model, world and what it goes on from, and its data."""
    check_found(run, found)
    job = resolve(run, info.world_size, device_type(), found.path)
    train_data, valid_data = _open(job, "train"), _open(job, "valid") if run.data.valid else None
    reader = StateReader(found.path) if found.path is not None else None
    start = begin(run, reader.progress if reader is not None else None, train_data, found.path)
    notes = clear_way(run, found) if info.rank == 0 else []
    return _Prepared(job, train_data, valid_data, start, reader, tuple(notes))


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
    options = EngineOptions(
        job.deepspeed, run.optimizer, run.parallel.sequence, run.train.recompute, run.train.seed, job.frozen
    )
    grid = create_grid(job.layout, info.rank)
    read_share = job.weights.share if job.weights is not None else None
    return build_engine(lambda at: model_stages(job.model.core, at), grid, device, options, read_share)


def _train(prepared: _Prepared, engine: Engine, reporter: Reporter, interrupt: Interrupt, watchdog: Watchdog) -> bool:
    """Train and export, or save and leave where `interrupt` says so; whether by a Ctrl-C, the same on every rank."""
    job, run, begin = prepared.job, prepared.job.run, prepared.begin
    summary = summarize(job, engine, prepared.train_data)
    if prepared.reader is not None:
        watchdog.beat("reading the checkpoint")
        load_state(engine, prepared.reader)
    with RunOutput(run, reporter, is_first=engine.grid.rank == 0) as output:
        output.start(summary, continue_after=begin.step if prepared.reader is not None else None)
        for note in (*prepared.notes, *_resumed(prepared)):
            output.note(note)
        flops = flops_per_position(job, summary.num_params, prepared.train_data)
        throughput = Throughput(flops, job.layout.world_size)
        saver = _saver(prepared, engine)
        loop = TrainingLoop(
            run, engine, prepared.train_data, prepared.valid_data, output, throughput, saver, begin, watchdog.beat
        )
        done = loop.run(interrupt)
        output.close(job.model.family.model_type)
        if done < run.train.steps:
            output.finish(f"stopped by {loop.reason} after step {done} of {run.train.steps}{loop.left_behind}")
            return loop.was_interrupted
        watchdog.beat("exporting")
        _export(job, engine, prepared.train_data, output)
        output.finish(f"done: {run.train.steps} steps; metrics and loss.png are in {run.output}")
        return False


def _resumed(prepared: _Prepared) -> Iterator[str]:
    """What to say of the checkpoint that the run goes on from."""
    if prepared.reader is None:
        return
    at, now = prepared.reader.origin, prepared.begin
    yield (
        f"goes on after step {now.step} from {prepared.reader.directory} (written at tp {at.tensor} x pp {at.pipeline} "
        f"x dp {at.data}, ZeRO-{at.zero_stage}, {at.precision})"
    )
    if now.data.samples == 0 and prepared.reader.progress.data.samples:
        yield "data.restart=true: the data begin anew"


def _saver(prepared: _Prepared, engine: Engine) -> Saver | None:
    job, run = prepared.job, prepared.job.run
    if not run.checkpoint.every:
        return None
    options = SaveOptions(
        folder=folder_of(run),
        keep=run.checkpoint.keep,
        asynchronous=run.checkpoint.asynchronous,
        protected=tuple(
            Path(path)
            for path in (prepared.reader.directory if prepared.reader is not None else None, run.model.path)
            if path is not None
        ),
        model_path=run.model.path,
        tokenizer_path=run.model.tokenizer_path,
    )
    layout = job.layout
    origin = Origin(
        world_size=layout.world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=layout.data,
        sequence=run.parallel.sequence,
        zero_stage=job.facts.zero_stage,
        precision=job.facts.precision,
        source=f"megatron-ds {__version__}",
    )
    return Saver(engine, job.model, options, origin)


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
    """Step after step, with a validation and a checkpoint now and then.

    Args:
        run: how many steps, in what batches, at what rate.
        engine: does a step.
        train_data: whose samples' order depends on seed and position alone, never on the layout.
        valid_data: None = no validation.
        output: is told of every logged step.
        throughput: counts positions, G * S a step, with an encoder-decoder's targets G * (S + T): the work done,
            padding included. `tokens` and `tokens_per_s` in the metrics count labelled tokens: what was learned from.
        saver: None = no checkpoints.
        begin: where the run stands.
        beat: is told what this rank does from now on.
    """

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        train_data: Dataset,
        valid_data: Dataset | None,
        output: RunOutput,
        throughput: Throughput,
        saver: Saver | None,
        begin: Progress,
        beat: Callable[[str], None],
    ) -> None:
        self._run, self._engine, self._output, self._throughput = run, engine, output, throughput
        self._train_data, self._valid_data, self._saver = train_data, valid_data, saver
        self._batches = GlobalBatches(len(train_data), run.train.global_batch_size, run.train.seed, run.data.shuffle)
        self._now, self._saved_step, self._beat = begin, begin.step, beat
        self._stopped_by = 0

    @property
    def reason(self) -> str:
        """For people: what stopped the run, on any rank."""
        if self._stopped_by == _CLOCK:
            return f"train.max_time={self._run.train.max_time:g}"
        return signal.Signals(self._stopped_by).name

    @property
    def was_interrupted(self) -> bool:
        """Whether a Ctrl-C stopped the run, on any rank."""
        return self._stopped_by == signal.SIGINT

    @property
    def left_behind(self) -> str:
        """For people: what the run can go on from."""
        if self._saver is None:
            return "; nothing was saved (checkpoint.every=0)"
        return f"; it goes on from checkpoint {name_of(self._saved_step)} when it is started again"

    def run(self, interrupt: Interrupt) -> int:
        """Train until the last step or until told to stop, and save; returns the number of steps done.

        Raises:
            TrainingError: on rank 0, after `train.max_bad_steps` steps in a row that were not finite.
            CheckpointError: a checkpoint could not be written.
        """
        steps = self._run.train.steps
        while self._now.step < steps:
            self._step(self._now.step + 1)
            if self._is_validation_due(self._now.step):
                self._validate(self._now.step)
            stop = self._agree(interrupt)
            if stop or self._now.step == steps or self._is_save_due(self._now.step):
                self._save()
            if stop:
                break
        self._beat(f"waiting until step {self._now.step} is saved")
        self._tell(self._saver.wait() if self._saver is not None else None)
        return self._now.step

    def _step(self, step: int) -> None:
        """One optimizer step; its seconds cover the reading of its data."""
        began_s = time.perf_counter()
        train, now = self._run.train, self._now
        lr = learning_rate(now.applied, train.steps, self._run.optimizer, self._run.schedule)
        self._beat(f"step {step}: reading data")
        batches = self._micro_batches(self._train_data, self._batches.indices_from(now.data.samples))
        self._beat(f"step {step}: forward and backward pass, optimizer")
        result = self._engine.train_step(batches, lr)
        bad = not result.applied and (not self._engine.can_overflow or not math.isfinite(result.loss))
        self._now = replace(
            now.with_data(samples=now.data.samples + train.global_batch_size),
            step=step,
            applied=now.applied + result.applied,
            bad_steps=now.bad_steps + 1 if bad else 0 if result.applied else now.bad_steps,
        )
        if step % train.log_every == 0 or step in (1, train.steps):
            self._output.step(self._metrics(step, lr, result, time.perf_counter() - began_s))
        if bad:
            self._refuse_to_go_on(result)

    def _refuse_to_go_on(self, result: StepResult) -> None:
        """Say that a step was skipped, and why; end the run if there were too many in a row."""
        step, times, most = self._now.step, self._now.bad_steps, self._run.train.max_bad_steps
        what = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
        self._output.note(f"step {step} was skipped, {times} of train.max_bad_steps={most} in a row: {what}")
        if times < most:
            return
        self._tell(self._saver.wait() if self._saver is not None else None)

        def refuse() -> None:
            raise TrainingError(
                f"train.max_bad_steps={most} steps in a row had no finite loss and gradient norm, the last was step "
                f"{step} ({what}){self.left_behind}; look at optimizer.lr and the data"
            )

        together(refuse)

    def _save(self) -> None:
        if self._saver is None or self._saved_step == self._now.step:
            return
        self._beat(f"saving after step {self._now.step}")
        self._tell(self._saver.save(self._now))
        self._saved_step = self._now.step

    def _tell(self, saved: Saved | None) -> None:
        if saved is not None:
            self._output.saved(saved)

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

    def _is_save_due(self, step: int) -> bool:
        every = self._run.checkpoint.every
        return every > 0 and step % every == 0

    def _validate(self, step: int) -> None:
        """The loss of the whole validation set; the last batch is filled up without labels."""
        data, size = self._valid_data, self._run.train.global_batch_size
        assert data is not None
        parts = []
        for number, indices in enumerate(ordered_pass(len(data), size), start=1):
            self._beat(f"validation after step {step}, batch {number}")
            parts.append(self._engine.evaluate(self._micro_batches(data, indices)))
        losses = reduce(operator.add, parts)
        self._output.valid(ValidMetrics(step, losses.mean))

    def _micro_batches(self, data: Dataset, indices: Sequence[int] | np.ndarray) -> list[dict[str, torch.Tensor]]:
        axis = self._engine.grid.data
        parts = for_data_rank(indices, axis.rank, axis.size, self._run.train.micro_batch_size)
        return [collate(data, part) for part in parts]

    def _agree(self, interrupt: Interrupt) -> bool:
        """Whether any rank was told to stop, so that all leave after the same step. Tells of a save that is done."""
        told = int(interrupt.signal or _CLOCK) if interrupt.requested else 0
        is_writing = self._saver is None or not self._saver.is_due
        flags = torch.tensor([told, int(is_writing)], device=self._engine.device)
        self._stopped_by, any_writing = all_reduce_(flags, self._engine.grid.world, dist.ReduceOp.MAX).tolist()
        if self._saver is not None and not any_writing:
            self._tell(self._saver.wait())
        return self._stopped_by > 0
