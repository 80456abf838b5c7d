"""The training loop: steps, validation, checkpoints."""

from __future__ import annotations

import math
import operator
import signal
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
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
from megatron_ds.data import Dataset, GlobalBatches, collate, cut_rows, for_data_rank, ordered_pass
from megatron_ds.data.blend import validation_sets
from megatron_ds.data.prefetch import DataWait, Prefetch, pinned
from megatron_ds.engine import Engine, Losses, StepResult
from megatron_ds.errors import TrainingError
from megatron_ds.monitor import MemoryMeter, StepMetrics, Throughput, ValidMetrics
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.consensus import run_on_all_ranks
from megatron_ds.parallel.regions import DATA, profiled
from megatron_ds.parallel.watchdog import Heartbeat
from megatron_ds.training.callbacks import SAVE, VALIDATE, CallbackList, RunState
from megatron_ds.training.graceful_stop import GracefulStop
from megatron_ds.training.lr_schedule import learning_rate
from megatron_ds.training.rank_times import RankTimesMeter
from megatron_ds.training.repeat_check import RepeatCheck
from megatron_ds.training.replica_check import ReplicaCheck
from megatron_ds.training.result import LossHistory, TrainResult
from megatron_ds.training.resume import checkpoint_folder
from megatron_ds.training.run_output import RunOutput
from megatron_ds.training.step_profile import StepProfile
from megatron_ds.training.step_shape import StepSamples, StepShapes
from megatron_ds.training.summary import positions_of

Batches = list[dict[str, torch.Tensor]]
"""The micro-batches of one data rank, out of a global batch."""

_TIME_LIMIT = int(signal.NSIG)  # shares a flag with signal numbers, which are below it
_NO_ROOM = _TIME_LIMIT + 1  # shares it too: the disk of the metrics has been full for too long


class TrainingLoop:
    """The loop over optimizer steps, with periodic validation and checkpoints.

    Args:
        run: the run file: number of steps, batch sizes, learning rate schedule.
        engine: the model under DeepSpeed.
        train_data: training samples; their order depends on seed and position alone, never on the layout.
        valid_data: validation samples; None = no validation.
        output: receives every logged step.
        throughput: counts positions, padding included: G * S a step, or G * (S + T) with an encoder-decoder's targets.
            `tokens` and `tokens_per_s` in the metrics count labelled tokens.
        saver: writes checkpoints; None = no checkpoints.
        begin: progress at the start: that of the checkpoint which the run resumes, if any.
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
        self._shapes = StepShapes.of_run(run)
        self._ahead, self._data_wait = run.data.prefetch, DataWait(run.data.prefetch)
        self._coming: Iterator[Batches] = iter(())
        self._now, self._saved_step, self._heartbeat = begin, begin.step, heartbeat
        self._stop_code, self._is_first_step = 0, True
        self._callbacks = callbacks if callbacks is not None else CallbackList(RunState(run, engine))
        self._losses, self._valid_losses = LossHistory(), LossHistory()
        self._valid_metrics: Mapping[str, float] = {}
        self._memory, self._mfus = MemoryMeter(engine.device), list[float]()
        self._profile = StepProfile(run, engine.grid.rank, output.note, heartbeat)
        self._replicas = ReplicaCheck(run, engine, self._give_up)
        self._repeats = RepeatCheck(run, engine, self._give_up)
        self._times = RankTimesMeter(run, engine, output)

    @property
    def stopped_by(self) -> str:
        """The callback, time limit or signal, on any rank, that stopped the run early."""
        if not self._stop_code:
            return f"callback {self._callbacks.stopped_by}"
        if self._stop_code == _TIME_LIMIT:
            return f"train.max_time={self._run.train.max_time:g}"
        return signal.Signals(self._stop_code).name

    @property
    def was_interrupted(self) -> bool:
        """True if a Ctrl-C on any rank stopped the run."""
        return self._stop_code == signal.SIGINT

    @property
    def resume_hint(self) -> str:
        """Text for the last message: the checkpoint from which the run can resume."""
        if self._saver is None:
            return "; nothing was saved (checkpoint.every=0)"
        if self._saved_step == 0:
            return "; nothing was saved yet"
        return f"; the same command resumes from checkpoint {name_of(self._saved_step)}"

    def result(self, exported: str | None) -> TrainResult:
        """Return the outcome of the run.

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
            last_valid_metrics=self._valid_metrics,
            output=output,
            metrics=output / "metrics.jsonl",
            checkpoint=saved,
            export=Path(exported) if exported is not None else None,
        )

    def run(self, interrupt: GracefulStop) -> int:
        """Train until the last step or a stop request, and save. Returns the number of steps done.

        Raises:
            TrainingError: on rank 0, after `train.max_bad_steps` consecutive steps that were not finite.
            CheckpointError: a checkpoint could not be written.
            TrainingError: on rank 0, after too many lines of metrics for which the disk had no room.
        """
        steps = self._run.train.num_steps
        self._callbacks.run_start(self._now.step)
        remaining = self._shapes.remaining(self._now.step, self._now.data.samples, steps)
        with Prefetch(self._read_train, remaining, self._ahead) as self._coming:
            while self._now.step < steps:
                step = self._now.step + 1
                with self._times.measuring(step):
                    with self._profile.around(step):
                        self._step(step)
                    stop = self._combine_requests(interrupt)
                if not stop and (self._callbacks.take(VALIDATE) or self._is_validation_due(self._now.step)):
                    stop = self._validate(self._now.step, interrupt)
                if stop or self._now.step == steps or self._callbacks.take(SAVE) or self._is_save_due(self._now.step):
                    self._save()
                if stop:
                    break
        self._heartbeat(f"waiting until step {self._now.step} is saved", may_take_long=True)
        self._finish_saves()
        if self._stop_code == _NO_ROOM:
            run_on_all_ranks(self._raise_no_room)
        self._output.write_usage(self._train_data, self._now.data.samples, is_last=True)
        return self._now.step

    def describe_use(self) -> str:
        """Return the run's peak memory and its MFU, as far as known, for its last line. Collective over the world."""
        self._memory.take()
        everyone = self._engine.grid.host
        peak_bytes = int(all_reduce_(torch.tensor(self._memory.largest_bytes), everyone, dist.ReduceOp.MAX))
        ranks = f" (the largest of {everyone.size} ranks)" if everyone.size > 1 else ""
        mfu = f"; MFU {statistics.median(self._mfus):.1%} (median of the steps)" if self._mfus else ""
        return f"peak memory {peak_bytes / 1e9:,.2f} GB{ranks}{mfu}"

    def describe_slow_ranks(self) -> str:
        """Return the ranks that were slow, for the run's last line; empty without any."""
        slow = self._times.describe()
        return f"; {slow}" if slow else ""

    def describe_validation(self) -> str:
        """Return the metrics of the last validation for the run's last line; empty without metrics."""
        found = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in self._valid_metrics.items())
        return f"; last validation: loss {self._valid_losses.last:.4f}, {found}" if found else ""

    def _read_train(self, samples: StepSamples) -> Batches:
        indices = self._batches.indices_from(samples.position, samples.size)
        return self._micro_batches(self._train_data, indices, samples.length)

    def _step(self, step: int) -> None:
        """Do one optimizer step; its time includes the wait for its data."""
        began_s = time.perf_counter()
        train, now, size = self._run.train, self._now, self._shapes.sizes.at(step)
        if (change := self._shapes.describe_change(step)) is not None:
            self._output.note(change)
        lr = learning_rate(now.applied, train.num_steps, self._run.optimizer, self._run.schedule)
        is_new = change is not None or self._is_first_step  # files are opened, kernels compiled, connections made
        self._is_first_step = False
        self._heartbeat(f"step {step}: reading data", may_take_long=is_new)
        with profiled(DATA):
            batches = next(self._coming)
        data_s = time.perf_counter() - began_s
        self._times.waited_for_data(data_s)
        self._heartbeat(f"step {step}: forward and backward pass, optimizer", may_take_long=is_new)
        self._repeats.before_step(step, batches)
        self._replicas.prepare(step)
        result = self._engine.train_step(batches, lr)
        self._losses.add(result.loss)
        bad = not result.applied and (not self._engine.can_overflow or not math.isfinite(result.loss))
        self._now = replace(
            now.with_data(samples=now.data.samples + size),
            step=step,
            applied=now.applied + result.applied,
            lr=lr if result.applied else now.lr,
            bad_steps=now.bad_steps + 1 if bad else 0 if result.applied else now.bad_steps,
        )
        step_s = time.perf_counter() - began_s
        self._times.end_window(step)
        is_logged = step % train.log_every == 0 or step in (1, train.num_steps)
        metrics = self._metrics(step, lr, result, step_s, data_s, measures_memory=is_logged)
        self._callbacks.step_end(metrics, result.applied)
        if is_logged:
            logged = {**metrics.metrics, **self._callbacks.take_logged()}
            self._output.step(replace(metrics, metrics=logged, ranks=self._times.take_numbers()))
        if (wait := self._data_wait.add(data_s, step_s)) is not None:
            self._output.note(wait)
        if bad:
            self._check_bad_steps(result)
        self._replicas.after_step(step, is_last=step == train.num_steps)

    def _check_bad_steps(self, result: StepResult) -> None:
        """Log that a step was skipped, and why; end the run after too many consecutive ones."""
        step, count, limit = self._now.step, self._now.bad_steps, self._run.train.max_bad_steps
        values = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
        self._output.note(f"skipped step {step} ({count} consecutive, train.max_bad_steps={limit}): {values}")
        if count < limit:
            return
        resume_hint = self._give_up()

        def raise_error() -> None:
            raise TrainingError(
                f"train.max_bad_steps={limit}: loss or gradient norm was not finite for {count} consecutive steps "
                f"(last: step {step}, {values}){resume_hint}; check optimizer.lr, the data and the weights that "
                "the run began with"
            )

        run_on_all_ranks(raise_error)

    def _give_up(self) -> str:
        """Wait until the last save is complete; return `resume_hint`. Collective over the world, before an error."""
        self._finish_saves()
        return self.resume_hint

    def _raise_no_room(self) -> None:
        if self._output.unwritten is not None:
            raise TrainingError(f"{self._output.unwritten}{self.resume_hint}; make room on that disk")

    def _save(self) -> None:
        if self._saver is None or self._saved_step == self._now.step:
            return
        self._replicas.before_save(self._now.step)
        self._heartbeat(f"saving after step {self._now.step}", may_take_long=True)
        self._report_saved(self._saver.save(self._now))
        self._output.write_usage(self._train_data, self._now.data.samples)
        self._saved_step = self._now.step

    def _finish_saves(self) -> None:
        """Wait until all saves are complete, and report them. Collective over the world."""
        if self._saver is not None:
            for saved in self._saver.finish(lambda text: self._heartbeat(text, may_take_long=True)):
                self._report_saved(saved)

    def _report_saved(self, saved: Saved | None) -> None:
        if saved is not None:
            self._output.saved(saved)
            self._callbacks.checkpoint_saved(saved)

    def _metrics(
        self, step: int, lr: float, result: StepResult, step_s: float, data_s: float, *, measures_memory: bool
    ) -> StepMetrics:
        shape, positions = self._shapes.logged(step), self._shapes.sizes.at(step) * positions_of(self._train_data)
        rates = self._throughput.rates(positions, step_s, self._shapes.length_at(step))
        memory = self._memory.take() if measures_memory else None
        self._mfus += [rates.mfu] if rates.mfu is not None else []
        return StepMetrics(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=result.tokens,
            step_s=step_s,
            tokens_per_s=result.tokens / step_s,
            tflops_per_rank=rates.tflops_per_rank,
            data_s=data_s,
            mfu=rates.mfu,
            peak_memory_bytes=memory.used_bytes if memory is not None else None,
            reserved_memory_bytes=memory.reserved_bytes if memory is not None else None,
            samples=shape.get("samples"),
            seq_length=shape.get("seq_length"),
            lrs={label: lr * factor for label, factor in self._run.optimizer.group_lrs.items()},
            terms=result.terms if len(result.terms) > 1 else {},
            metrics=result.metrics,
        )

    def _is_validation_due(self, step: int) -> bool:
        """Return whether to validate after a step: after the last one in any case."""
        every = self._run.train.eval_every
        return self._valid_data is not None and (step == self._run.train.num_steps or (every > 0 and step % every == 0))

    def _is_save_due(self, step: int) -> bool:
        every = self._run.checkpoint.every
        return every > 0 and step % every == 0

    def _validate(self, step: int, interrupt: GracefulStop) -> bool:
        """Compute the loss of each validation set, and of all; the last batch of a set is padded without labels.

        On a stop request the remaining batches are skipped and nothing is logged, because time may be short.

        Returns:
            True if the run has to stop.
        """
        assert self._valid_data is not None
        sets = validation_sets(self._valid_data)
        found: dict[str, Losses] = {}
        for name, data in sets.items():
            losses = self._losses_on(data, f"validation{f' on {name}' if name else ''} after step {step}", interrupt)
            if losses is None:
                return True
            found[name] = losses
        total = reduce(operator.add, found.values())
        self._valid_losses.add(total.mean)
        named = {name: losses for name, losses in found.items() if name}
        of_sets = {f"{name}/{key}": value for name, one in named.items() for key, value in one.metrics.items()}
        self._valid_metrics = {**total.metrics, **of_sets}
        valid = ValidMetrics(
            step, total.mean, self._valid_metrics, {name: losses.mean for name, losses in named.items()}
        )
        self._output.valid(valid)
        self._callbacks.validation_end(valid)
        return bool(self._callbacks) and self._combine_requests(interrupt)

    def _losses_on(self, data: Dataset, phase: str, interrupt: GracefulStop) -> Losses | None:
        """Return the losses of all samples of a validation set; None if the run has to stop."""
        size, parts = self._run.train.global_batch_size, []
        with Prefetch(partial(self._micro_batches, data), ordered_pass(len(data), size), self._ahead) as batches:
            for number in range(1, -(-len(data) // size) + 1):
                self._heartbeat(f"{phase}, batch {number}")
                parts.append(self._engine.evaluate(next(batches)))
                if self._combine_requests(interrupt):
                    return None
        return reduce(operator.add, parts)

    def _micro_batches(self, data: Dataset, indices: Sequence[int] | np.ndarray, length: int | None = None) -> Batches:
        """Return this data rank's micro-batches, with rows cut to a length; None = they stay as they are."""
        axis = self._engine.grid.batch
        parts = for_data_rank(indices, axis.rank, axis.size, self._run.train.micro_batch_size)
        batches = [collate(data, part) for part in parts]
        if length not in (None, data.seq_length):
            batches = [cut_rows(batch, length) for batch in batches]
        return pinned(batches, self._engine.device) if self._ahead else batches

    def _combine_requests(self, interrupt: GracefulStop) -> bool:
        """Combine the requests of all ranks, so that all act after the same step.

        Collective over the world, in host memory. Reports a save that is complete on every rank.

        Returns:
            True if the run has to stop.
        """
        stop_code = int(interrupt.signal or _TIME_LIMIT) if interrupt.requested else 0
        stop_code = _NO_ROOM if self._output.unwritten is not None else stop_code
        is_writing = self._saver is None or not self._saver.is_due
        flags = torch.tensor([stop_code, int(is_writing), *self._callbacks.flags])
        agreed = all_reduce_(flags, self._engine.grid.host, dist.ReduceOp.MAX).tolist()
        self._stop_code, any_writing, *requests = agreed
        self._callbacks.agree(requests)
        if self._saver is not None and not any_writing:
            self._report_saved(self._saver.wait())
        return self._stop_code > 0 or self._callbacks.stopped_by is not None
