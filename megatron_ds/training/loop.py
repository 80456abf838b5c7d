"""Step after step: what a run does between its beginning and its end."""

from __future__ import annotations

import math
import operator
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_ds.checkpoint.directory import name_of
from megatron_ds.checkpoint.progress import Progress
from megatron_ds.checkpoint.saver import Saved, Saver
from megatron_ds.config import RunConfig
from megatron_ds.data import Dataset, GlobalBatches, collate, for_data_rank, ordered_pass
from megatron_ds.data.prefetch import DataWait, Prefetch, pinned
from megatron_ds.engine import Engine, StepResult
from megatron_ds.errors import TrainingError
from megatron_ds.monitor import StepMetrics, Throughput, ValidMetrics
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.consensus import run_on_all_ranks
from megatron_ds.parallel.regions import DATA, profiled
from megatron_ds.training.callbacks import SAVE, VALIDATE, CallbackList, RunState
from megatron_ds.training.graceful_stop import GracefulStop
from megatron_ds.training.lr_schedule import learning_rate
from megatron_ds.training.result import LossHistory, TrainResult
from megatron_ds.training.resume import checkpoint_folder
from megatron_ds.training.run_output import RunOutput
from megatron_ds.training.step_profile import StepProfile
from megatron_ds.training.summary import positions_of
from megatron_ds.training.watchdog import Heartbeat

Batches = list[dict[str, torch.Tensor]]
"""The micro-batches of one data rank's share of a global batch."""

_CLOCK = 1  # beside the numbers of signals, of which 1, SIGHUP, is none that stops a run


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
        heartbeat: called with the phase that this rank enters.
        callbacks: called at the run's events; None = no callbacks.
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
        heartbeat: Heartbeat,
        callbacks: CallbackList | None = None,
    ) -> None:
        self._run, self._engine, self._output, self._throughput = run, engine, output, throughput
        self._train_data, self._valid_data, self._saver = train_data, valid_data, saver
        shuffle = run.data.shuffle and not train_data.ordered
        self._batches = GlobalBatches(len(train_data), run.train.global_batch_size, run.train.seed, shuffle)
        self._ahead, self._data_wait = run.data.prefetch, DataWait(run.data.prefetch)
        self._coming: Iterator[Batches] = iter(())
        self._now, self._saved_step, self._beat = begin, begin.step, heartbeat
        self._stopped_by = 0
        self._callbacks = callbacks if callbacks is not None else CallbackList(RunState(run, engine))
        self._losses, self._valid_losses = LossHistory(), LossHistory()
        self._profile = StepProfile(run, engine.grid.rank, output.note, heartbeat)

    @property
    def reason(self) -> str:
        """The reason for an early stop of the run, on any rank."""
        if not self._stopped_by:
            return f"callback {self._callbacks.stopped_by}"
        if self._stopped_by == _CLOCK:
            return f"train.max_time={self._run.train.max_time:g}"
        return signal.Signals(self._stopped_by).name

    @property
    def was_interrupted(self) -> bool:
        """True if a Ctrl-C on any rank stopped the run."""
        return self._stopped_by == signal.SIGINT

    @property
    def left_behind(self) -> str:
        """For people: what the run can go on from."""
        if self._saver is None:
            return "; nothing was saved (checkpoint.every=0)"
        if self._saved_step == 0:
            return "; nothing was saved yet"
        return f"; it goes on from checkpoint {name_of(self._saved_step)} when it is started again"

    def result(self, exported: str | None) -> TrainResult:
        """Return what the run has come to.

        Args:
            exported: the Hugging Face directory that was written; None = none.
        """
        output = Path(self._run.output)
        saved = checkpoint_folder(self._run.output) / name_of(self._saved_step) if self._saved_step else None
        return TrainResult(
            steps=self._now.step,
            last_loss=self._losses.last,
            best_loss=self._losses.best,
            last_valid_loss=self._valid_losses.last,
            best_valid_loss=self._valid_losses.best,
            output=output,
            metrics=output / "metrics.jsonl",
            checkpoint=saved,
            export=Path(exported) if exported is not None else None,
        )

    def run(self, interrupt: GracefulStop) -> int:
        """Train until the last step or until told to stop, and save; returns the number of steps done.

        Raises:
            TrainingError: on rank 0, after `train.max_bad_steps` steps in a row that were not finite.
            CheckpointError: a checkpoint could not be written.
        """
        steps = self._run.train.steps
        self._callbacks.run_start(self._now.step)
        with Prefetch(self._read_train, self._positions(), self._ahead) as self._coming:
            while self._now.step < steps:
                with self._profile.around(self._now.step + 1):
                    self._step(self._now.step + 1)
                stop = self._agree(interrupt)
                if not stop and (self._callbacks.take(VALIDATE) or self._is_validation_due(self._now.step)):
                    stop = self._validate(self._now.step, interrupt)
                if stop or self._now.step == steps or self._callbacks.take(SAVE) or self._is_save_due(self._now.step):
                    self._save()
                if stop:
                    break
        self._beat(f"waiting until step {self._now.step} is saved", may_take_long=True)
        self._tell(self._saver.wait() if self._saver is not None else None)
        self._output.taken(self._train_data, self._now.data.samples, is_last=True)
        return self._now.step

    def _positions(self) -> range:
        """Where the batches of the steps to come begin in the stream of samples."""
        begin, size = self._now.data.samples, self._run.train.global_batch_size
        return range(begin, begin + size * (self._run.train.steps - self._now.step), size)

    def _read_train(self, position: int) -> Batches:
        return self._micro_batches(self._train_data, self._batches.indices_from(position))

    def _step(self, step: int) -> None:
        """One optimizer step; its seconds cover the wait for its data."""
        began_s = time.perf_counter()
        train, now = self._run.train, self._now
        lr = learning_rate(now.applied, train.steps, self._run.optimizer, self._run.schedule)
        self._beat(f"step {step}: reading data")
        with profiled(DATA):
            batches = next(self._coming)
        data_s = time.perf_counter() - began_s
        self._beat(f"step {step}: forward and backward pass, optimizer")
        result = self._engine.train_step(batches, lr)
        self._losses.add(result.loss)
        bad = not result.applied and (not self._engine.can_overflow or not math.isfinite(result.loss))
        self._now = replace(
            now.with_data(samples=now.data.samples + train.global_batch_size),
            step=step,
            applied=now.applied + result.applied,
            bad_steps=now.bad_steps + 1 if bad else 0 if result.applied else now.bad_steps,
        )
        step_s = time.perf_counter() - began_s
        metrics = self._metrics(step, lr, result, step_s, data_s)
        self._callbacks.step_end(metrics, result.applied)
        if step % train.log_every == 0 or step in (1, train.steps):
            self._output.step(replace(metrics, metrics={**metrics.metrics, **self._callbacks.take_logged()}))
        if (wait := self._data_wait.add(data_s, step_s)) is not None:
            self._output.note(wait)
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

        run_on_all_ranks(refuse)

    def _save(self) -> None:
        if self._saver is None or self._saved_step == self._now.step:
            return
        self._beat(f"saving after step {self._now.step}", may_take_long=True)
        self._tell(self._saver.save(self._now))
        self._output.taken(self._train_data, self._now.data.samples)
        self._saved_step = self._now.step

    def _tell(self, saved: Saved | None) -> None:
        if saved is not None:
            self._output.saved(saved)
            self._callbacks.checkpoint_saved(saved)

    def _metrics(self, step: int, lr: float, result: StepResult, step_s: float, data_s: float) -> StepMetrics:
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
            data_s=data_s,
            terms=result.terms if len(result.terms) > 1 else {},
            metrics=result.metrics,
        )

    def _is_validation_due(self, step: int) -> bool:
        every = self._run.train.eval_every
        return self._valid_data is not None and every > 0 and (step % every == 0 or step == self._run.train.steps)

    def _is_save_due(self, step: int) -> bool:
        every = self._run.checkpoint.every
        return every > 0 and step % every == 0

    def _validate(self, step: int, interrupt: GracefulStop) -> bool:
        """The loss of the whole validation set; the last batch is filled up without labels.

        Whoever stops the run has little time: then the rest is left out and nothing is told. Returns whether.
        """
        data, size = self._valid_data, self._run.train.global_batch_size
        assert data is not None
        parts = []
        count = -(-len(data) // size)
        with Prefetch(partial(self._micro_batches, data), ordered_pass(len(data), size), self._ahead) as batches:
            for number in range(1, count + 1):
                self._beat(f"validation after step {step}, batch {number}")
                parts.append(self._engine.evaluate(next(batches)))
                if self._agree(interrupt):
                    return True
        losses = reduce(operator.add, parts)
        self._valid_losses.add(losses.mean)
        valid = ValidMetrics(step, losses.mean, losses.metrics)
        self._output.valid(valid)
        self._callbacks.validation_end(valid)
        return bool(self._callbacks) and self._agree(interrupt)

    def _micro_batches(self, data: Dataset, indices: Sequence[int] | np.ndarray) -> Batches:
        axis = self._engine.grid.batch
        parts = for_data_rank(indices, axis.rank, axis.size, self._run.train.micro_batch_size)
        batches = [collate(data, part) for part in parts]
        return pinned(batches, self._engine.device) if self._ahead else batches

    def _agree(self, interrupt: GracefulStop) -> bool:
        """Combine the requests of all ranks, so that all act after the same step. Collective over the world.

        Reports a save that is complete on every rank.

        Returns:
            whether the run stops.
        """
        told = int(interrupt.signal or _CLOCK) if interrupt.requested else 0
        is_writing = self._saver is None or not self._saver.is_due
        flags = torch.tensor([told, int(is_writing), *self._callbacks.flags], device=self._engine.device)
        agreed = all_reduce_(flags, self._engine.grid.world, dist.ReduceOp.MAX).tolist()
        self._stopped_by, any_writing, *requests = agreed
        self._callbacks.agree(requests)
        if self._saver is not None and not any_writing:
            self._tell(self._saver.wait())
        return self._stopped_by > 0 or self._callbacks.stopped_by is not None
