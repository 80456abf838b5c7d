"""Training on one rank: join the process group, check the run, open data, resume, train, export."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_ds.checkpoint.load import continues_optimizer, load_state
from megatron_ds.checkpoint.local_disks import LocalDisk
from megatron_ds.checkpoint.masters import check_masters
from megatron_ds.checkpoint.progress import Progress
from megatron_ds.checkpoint.reader import ResumePoint, StateReader
from megatron_ds.checkpoint.remote_copies import check_copies
from megatron_ds.checkpoint.saver import Saver
from megatron_ds.config import RunConfig
from megatron_ds.data import Dataset, collate
from megatron_ds.engine import (
    Engine,
    device_type,
    start_distributed,
    state_kinds_of,
    stop_distributed,
)
from megatron_ds.hf.end_tokens import known_end_ids
from megatron_ds.hub import describe_upload
from megatron_ds.monitor import Reporter, Throughput
from megatron_ds.parallel.agreement import Council
from megatron_ds.parallel.consensus import gather_objects, run_on_all_ranks
from megatron_ds.parallel.rank_info import RENDEZVOUS_FILE, RankInfo
from megatron_ds.parallel.rank_status import rank_status_store
from megatron_ds.parallel.rendezvous import RankGroup, meet
from megatron_ds.parallel.watchdog import Heartbeat, Watchdog
from megatron_ds.runtime.averaged_weights import averaged_weights
from megatron_ds.runtime.export import check_export, export_live
from megatron_ds.runtime.saving import make_saver
from megatron_ds.runtime.setup import build
from megatron_ds.training.agreement import check_same_run
from megatron_ds.training.automatic import choose_together, warn_of_misfit
from megatron_ds.training.callbacks import Callback, CallbackList, RunState, make_callbacks
from megatron_ds.training.checkpoint_copies import CheckpointCopier
from megatron_ds.training.datasets import check_same_data, open_data, taught_ends
from megatron_ds.training.device_test import run_device_test
from megatron_ds.training.graceful_stop import GracefulStop, ending_at_once
from megatron_ds.training.loop import TrainingLoop
from megatron_ds.training.lr_schedule import check_schedule, describe_jump
from megatron_ds.training.model_paths import with_pinned_models
from megatron_ds.training.pushing import prepare_upload, upload
from megatron_ds.training.resolve import ResolvedRun, device_settings, export_target, resolve_run
from megatron_ds.training.restarts import SupervisedStart, begin_start
from megatron_ds.training.result import TrainResult
from megatron_ds.training.resume import (
    check_resume_point,
    checkpoint_folder,
    find_resume_point,
    initial_progress,
    lock_output,
    prepare_local_disk,
    prepare_output,
)
from megatron_ds.training.run_output import RunOutput
from megatron_ds.training.samples import SamplePrompts, SampleWriter, prepare_samples
from megatron_ds.training.start_log import log_failure, logging_failure
from megatron_ds.training.statement import describe_ends
from megatron_ds.training.summary import device_peak, flops_per_position, summarize

COLLECTIVE_TIMEOUT_S = 7200.0  # at least; longer than the watchdog's limits, whose report says more


def train_rank(
    run: RunConfig, info: RankInfo, reporter: Reporter, callbacks: Sequence[Callback] = (), notes: Sequence[str] = ()
) -> TrainResult:
    """Train as one rank of a job: join the process group, check the run, open data, resume, train, export.

    Collective over the world. After an exception the process group is left as it is: destroying it waits for peers,
    which may be waiting for this rank. The process is expected to end.

    Args:
        run: the run file.
        info: rank and world size of this process.
        reporter: shows progress, on rank 0.
        callbacks: called after those that the run file names.
        notes: lines that are shown first.

    Raises:
        MegatronDSError: the run is invalid, or fails in a way that the user can fix; see `run_on_all_ranks` for which
            rank raises it.
        KeyboardInterrupt: after SIGINT, once every rank has finished its step, saved, and closed its files.
    """
    interrupt = GracefulStop(run.train.max_time)
    with ending_at_once():
        group = None if RENDEZVOUS_FILE in os.environ else meet(info, run.train.start_timeout)
    output = Path(run.output)
    on_hang = partial(log_failure, output, info.rank)
    watchdog = Watchdog(info, run.train.step_timeout, rank_status_store(group), on_hang=on_hang)
    with ExitStack() as context:
        context.enter_context(watchdog)
        context.enter_context(logging_failure(output, info.rank))
        with ending_at_once():
            started = _start(run, info, group, watchdog.heartbeat, callbacks)
            started = replace(started, notes=(*notes, *started.notes))
        context.enter_context(interrupt)
        result, was_interrupted = _train(started, reporter, interrupt, watchdog)
        started.restart.record("ended")
        watchdog.heartbeat("leaving the process group", may_take_long=True)
        stop_distributed()
        del started  # until here it holds the lock of the output, so that no other run can write to it
    if was_interrupted:
        raise KeyboardInterrupt
    return result


@dataclass(frozen=True)
class _Started:
    prepared: _Prepared
    engine: Engine
    restart: SupervisedStart
    output_lock: object
    notes: Sequence[str]
    disk: LocalDisk | None


def _start(
    run: RunConfig, info: RankInfo, group: RankGroup | None, heartbeat: Heartbeat, callbacks: Sequence[Callback]
) -> _Started:
    """Join the process group, check the run, open data, build the model, resume. Collective over the world."""
    heartbeat("comparing what the ranks run", may_take_long=True)
    check_same_run(run, info, group)
    if run.choices:
        heartbeat(f"choosing {' and '.join(run.choices)}", may_take_long=True)
    council = Council(info, group) if group is not None and info.world_size > 1 else None
    choice = choose_together(run, info.world_size, device_type(), council)
    run = choice.run
    heartbeat("joining the process group", may_take_long=True)
    timeout_s = max(COLLECTIVE_TIMEOUT_S, 2 * run.train.step_timeout)
    device = start_distributed(info, timeout_s, group, device_settings(run))
    heartbeat("locking the output", may_take_long=True)
    existing_lock = run_on_all_ranks(lambda: lock_output(run) if info.rank == 0 else None)
    restart = begin_start(run, info)
    run = restart.resume(run)
    heartbeat("looking up models on the hub", may_take_long=True)
    run = gather_objects(run_on_all_ranks(lambda: with_pinned_models(run) if info.rank == 0 else run))[0]
    heartbeat("looking for a checkpoint to resume", may_take_long=True)
    found = find_resume_point(run, info)
    heartbeat("reading model and data", may_take_long=True)
    prepared = run_on_all_ranks(lambda: _prepare(run, info, found, callbacks))
    resolved = prepared.resolved
    check_same_data(prepared.train_data, resolved.run)
    heartbeat("planning the memory", may_take_long=True)  # on all ranks, whose heartbeats are compared
    if info.rank == 0:
        warn_of_misfit(resolved, device.type)
    tested = []
    if resolved.run.train.device_test:
        heartbeat("testing devices, memory and links", may_take_long=True)
        tested = run_device_test(info, device)
    held_lock = run_on_all_ranks(lambda: restart.make_output(existing_lock) if info.rank == 0 else None)
    heartbeat("building the model", may_take_long=True)
    if resolved.run.export is not None and resolved.run.export.merge:
        resolved.model.prepare(resolved.hf.table if info.rank == 0 else ())  # the base is read again at the end
    engine = build(resolved.model, resolved.plan, info.rank, device)
    if prepared.reader is not None:
        heartbeat("reading the checkpoint", may_take_long=True)
        load_state(engine, prepared.reader, resets_optimizer=run.checkpoint.optimizer == "reset")
    heartbeat("preparing the output", may_take_long=True)
    output_lock, notes = run_on_all_ranks(
        lambda: prepare_output(run, found, held_lock) if info.rank == 0 else (None, ())
    )
    disk = prepare_local_disk(run, found, info)
    restart.record("prepared")
    return _Started(prepared, engine, restart, output_lock, (*choice.notes, *tested, *restart.notes(), *notes), disk)


@dataclass(frozen=True)
class _Prepared:
    resolved: ResolvedRun
    train_data: Dataset
    valid_data: Dataset | None
    begin: Progress
    reader: StateReader | None
    is_reset: bool
    ends: Mapping[int, str]
    callbacks: Sequence[tuple[str, Callback]]
    samples: SamplePrompts | None


def _prepare(run: RunConfig, info: RankInfo, found: ResumePoint, callbacks: Sequence[Callback]) -> _Prepared:
    """Check the run against its model, world, checkpoint and data; all that can be refused is refused here."""
    check_resume_point(run, found)
    resolved = resolve_run(run, info.world_size, device_type(), found.path)
    if info.rank == 0:
        prepare_upload(run.export)
        if run.checkpoint.copy_to is not None:
            check_copies(run.checkpoint.copy_to)
    resolved, train_data, valid_data = open_data(resolved)
    check_schedule(resolved.run)
    run = run.model_copy(update={"train": resolved.run.train})  # paths stay as the user wrote them
    reader = StateReader(found.path) if found.path is not None else None
    is_reset = reader is not None and not continues_optimizer(
        reader,
        state_kinds_of(run.optimizer),
        run.optimizer.name,
        resets=run.checkpoint.optimizer == "reset",
    )
    if info.rank == 0 and reader is not None:
        check_masters(reader, sampled=True)
    start = initial_progress(run, reader.progress if reader is not None else None, train_data, found.path)
    named = [*make_callbacks(run), *((type(one).__name__, one) for one in callbacks)]
    ends = taught_ends(resolved, train_data)
    samples = prepare_samples(resolved.run, resolved.model, list(ends))
    return _Prepared(resolved, train_data, valid_data, start, reader, is_reset, ends, named, samples)


def _train(
    started: _Started, reporter: Reporter, interrupt: GracefulStop, watchdog: Watchdog
) -> tuple[TrainResult, bool]:
    """Train and export, or save and return when a stop is requested.

    Returns:
        the result, and whether Ctrl-C ended the run; the same on every rank.
    """
    prepared, engine = started.prepared, started.engine
    resolved, run, begin = prepared.resolved, prepared.resolved.run, prepared.begin
    summary = summarize(resolved, engine, prepared.train_data, prepared.valid_data)
    with RunOutput(run, reporter, is_first=engine.grid.rank == 0) as output:
        continue_after = begin.step if prepared.reader is not None else None
        run_on_all_ranks(lambda: output.start(summary, continue_after))  # a tracker may refuse
        for note in (*started.notes, *_notes(prepared, engine), *(f"kernel of {name}" for name in engine.kernels)):
            output.note(note)
        flops = flops_per_position(resolved, summary.num_params, prepared.train_data)
        peak = device_peak(resolved, engine.device)
        shorter = {
            stage.length: flops_per_position(resolved, summary.num_params, prepared.train_data, stage.length)
            for stage in summary.row_lengths
        }
        throughput = Throughput(flops, resolved.plan.layout.world_size, peak, shorter)
        saver = _saver(prepared, engine, started.disk)
        state = RunState(run, engine, can_save=saver is not None, can_validate=prepared.valid_data is not None)
        own = [*_samples(prepared, output, watchdog), *_copies(resolved, output, watchdog)]
        callbacks = CallbackList(state, [*started.restart.callbacks(), *prepared.callbacks, *own])
        loop = TrainingLoop(
            run,
            engine,
            prepared.train_data,
            prepared.valid_data,
            output,
            throughput,
            saver,
            begin,
            watchdog.heartbeat,
            callbacks,
        )
        done = loop.run(interrupt)
        is_stopped = done < run.train.num_steps
        outcome = f"stopped by {loop.stopped_by} after step {done}" if is_stopped else f"done after step {done}"
        watchdog.heartbeat("closing metrics", may_take_long=True)  # trackers send what waits
        output.close(resolved.hf.family.model_type, outcome)
        if is_stopped:
            watchdog.enter_foreign_code("callbacks at the run's end")
            callbacks.run_end(stopped_by=loop.stopped_by)
            stopped_text = f"stopped by {loop.stopped_by} after step {done} of {run.train.num_steps}"
            output.finish(f"{stopped_text}{loop.describe_slow_ranks()}{loop.resume_hint}")
            return loop.result(exported=None), loop.was_interrupted
        watchdog.heartbeat("exporting", may_take_long=True)
        _export(prepared, engine, output)
        watchdog.enter_foreign_code("callbacks at the run's end")
        callbacks.run_end(exported=run.export.path if run.export is not None else None)
        done_text = f"done: {run.train.num_steps} steps; metrics and loss.png are in {run.output}"
        output.finish(f"{done_text}; {loop.describe_use()}{loop.describe_slow_ranks()}{loop.describe_validation()}")
        return loop.result(exported=run.export.path if run.export is not None else None), False


def _samples(prepared: _Prepared, output: RunOutput, watchdog: Watchdog) -> list[tuple[str, Callback]]:
    """Return the callback that draws samples, if the run has prompts."""
    if prepared.samples is None:
        return []
    after = prepared.begin.step if prepared.reader is not None else None
    writer = SampleWriter(prepared.resolved.run, prepared.samples, output.note, watchdog.heartbeat, after)
    return [("train.samples", writer)]


def _copies(resolved: ResolvedRun, output: RunOutput, watchdog: Watchdog) -> list[tuple[str, Callback]]:
    """Return the callback that copies checkpoints, if the run has a place for them."""
    run = resolved.run
    if run.checkpoint.copy_to is None:
        return []
    folder = checkpoint_folder(run.output)
    return [("checkpoint.copy_to", CheckpointCopier(run, folder, output.note, watchdog.heartbeat))]


def _notes(prepared: _Prepared, engine: Engine) -> Iterator[str]:
    """Yield log lines about what may not be meant, and about the checkpoint that the run resumes."""
    yield from _resume_notes(prepared)
    idle = device_settings(prepared.resolved.run).describe_idle(engine.device)
    if idle is not None:
        yield idle
    model = prepared.resolved.model
    ends = describe_ends(prepared.resolved.run, prepared.ends, known_end_ids(model.hf, model.section.path))
    if ends is not None:
        yield ends


def _resume_notes(prepared: _Prepared) -> Iterator[str]:
    """Yield log lines about the checkpoint that the run resumes; none if it starts."""
    if prepared.reader is None:
        return
    at, now = prepared.reader.origin, prepared.begin
    yield (
        f"resuming from step {now.step}, checkpoint {prepared.reader.directory} (written at tp {at.tensor} x pp "
        f"{at.pipeline} x dp {at.data}, ZeRO-{at.zero_stage}, {at.precision})"
    )
    if now.step == prepared.resolved.run.train.num_steps:
        yield f"nothing is left to train: train.steps={now.step} are done; a larger train.steps continues the run"
    jump = describe_jump(prepared.reader.progress, prepared.resolved.run)
    if jump is not None:
        yield jump
    if prepared.reader.has_average and prepared.resolved.run.train.ema is None:
        yield "the checkpoint's average of the weights is not continued: train.ema is not set"
    elif not prepared.reader.has_average and prepared.resolved.run.train.ema is not None:
        yield f"train.ema: the average of the weights begins at step {now.step}; the checkpoint has none"
    if prepared.is_reset:
        yield "checkpoint.optimizer=reset: the checkpoint has the state of another optimizer; this one begins without"
    if now.data.samples == 0 and prepared.reader.progress.data.samples:
        yield "data.restart=true: data position reset"


def _end_ids(prepared: _Prepared) -> list[int]:
    """Return the ids that the data teach as an end, those of the run before it was resumed included."""
    return list(dict.fromkeys([*prepared.begin.end_ids, *prepared.ends]))


def _saver(prepared: _Prepared, engine: Engine, disk: LocalDisk | None) -> Saver | None:
    resolved, run = prepared.resolved, prepared.resolved.run
    if not run.checkpoint.every:
        return None
    read = prepared.reader.directory if prepared.reader is not None else None
    return make_saver(
        engine,
        resolved.model,
        resolved.plan,
        checkpoint_folder(run.output),
        keep=run.checkpoint.keep,
        asynchronous=run.checkpoint.asynchronous,
        protected=(read,),
        end_ids=_end_ids(prepared),
        disk=disk,
    )


def _export(prepared: _Prepared, engine: Engine, output: RunOutput) -> None:
    resolved, section = prepared.resolved, prepared.resolved.run.export
    if section is None:
        return
    precision = resolved.plan.summary.precision
    is_adapters = resolved.model.adapters is not None and not section.merge
    kind = "a PEFT adapter directory" if is_adapters else "a Hugging Face directory"
    averaged = " of the averaged weights" if section.ema else ""
    with averaged_weights(engine) if section.ema else nullcontext():
        export_live(engine, resolved.model, section, precision, export_target(resolved.run), _end_ids(prepared))
        output.note(f"exported {kind}{averaged}: {section.path}")
        if section.check:
            batch = collate(prepared.train_data, range(resolved.run.train.micro_batch_size))
            error = check_export(engine, resolved.hf, section, precision, batch)
            output.note(f"its predictions in transformers equal those in training: relative error {error:.1e}")
    address = upload(resolved, engine.grid.rank)
    if address is not None:
        output.note(describe_upload(section.push_to or "", address))
