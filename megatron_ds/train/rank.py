"""One rank's part of a training run: join the others, check and read together, resume, train, export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ds import __version__
from megatron_ds.checkpoint.load import load_state
from megatron_ds.checkpoint.progress import Origin, Progress
from megatron_ds.checkpoint.reader import Found, StateReader
from megatron_ds.checkpoint.saver import SaveOptions, Saver
from megatron_ds.config import RunConfig
from megatron_ds.data import Dataset, collate
from megatron_ds.engine import (
    Engine,
    EngineOptions,
    build_engine,
    device_type,
    share_memory,
    start_distributed,
    stop_distributed,
)
from megatron_ds.monitor import Reporter, Throughput, read_metrics
from megatron_ds.parallel.grid import create_grid
from megatron_ds.parallel.rank import RankInfo
from megatron_ds.train.data import has_validation, open_split
from megatron_ds.train.export import check_export, export_live
from megatron_ds.train.interrupt import Interrupt
from megatron_ds.train.job import Job, resolve
from megatron_ds.train.loop import TrainingLoop
from megatron_ds.train.output import RunOutput
from megatron_ds.train.resume import begin, begin_output, check_found, claim, find, folder_of
from megatron_ds.train.summary import flops_per_position, summarize
from megatron_ds.train.together import together
from megatron_ds.train.watchdog import Watchdog, board_of

COLLECTIVE_TIMEOUT_S = 1800.0  # of a collective, at least: the watchdog, which says more, comes first


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
        claimed = together(lambda: claim(run) if info.rank == 0 else None)
        found = find(run, info)
        prepared = together(lambda: _prepare(run, info, found))
        engine = build(prepared.job, info, device)
        if prepared.reader is not None:
            load_state(engine, prepared.reader)
        held, notes = together(lambda: begin_output(run, found, claimed) if info.rank == 0 else (None, ()))
        with Watchdog(info, run.train.step_timeout, board_of(info)) as watchdog:
            was_interrupted = _train(prepared, engine, reporter, interrupt, watchdog, notes)
        stop_distributed()
        del held  # until here no other run could write to the output
    if was_interrupted:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class _Prepared:
    job: Job
    train_data: Dataset
    valid_data: Dataset | None
    begin: Progress
    reader: StateReader | None


def _prepare(run: RunConfig, info: RankInfo, found: Found) -> _Prepared:
    """Everything that can be refused: the run against model, world and what it goes on from, and its data."""
    check_found(run, found)
    job = resolve(run, info.world_size, device_type(), found.path)
    train_data, valid_data = open_split(job, "train"), open_split(job, "valid") if has_validation(run) else None
    reader = StateReader(found.path) if found.path is not None else None
    start = begin(run, reader.progress if reader is not None else None, train_data, found.path)
    metrics = Path(run.output) / "metrics.jsonl"
    if info.rank == 0 and reader is not None and metrics.is_file():
        read_metrics(metrics)  # a line that is none is refused now
    return _Prepared(job, train_data, valid_data, start, reader)


def build(job: Job, info: RankInfo, device: torch.device) -> Engine:
    """This rank's engine for a job. Collective over the world.

    Raises:
        ConfigError: see `build_engine` and `share_memory`.
    """
    run = job.run
    options = EngineOptions(
        job.deepspeed,
        run.optimizer,
        run.parallel.sequence,
        run.train.recompute,
        run.train.seed,
        job.frozen,
        run.train.compile,
        run.train.kernels,
    )
    grid = create_grid(job.layout, info.rank)
    if run.parallel.shared_memory and grid.tensor.size > 1:
        grid = share_memory(grid, together)
    return build_engine(job.stages, grid, device, options, job.read_share)


def _train(
    prepared: _Prepared,
    engine: Engine,
    reporter: Reporter,
    interrupt: Interrupt,
    watchdog: Watchdog,
    notes: Sequence[str],
) -> bool:
    """Train and export, or save and leave where `interrupt` says so; whether by a Ctrl-C, the same on every rank."""
    job, run, begin = prepared.job, prepared.job.run, prepared.begin
    summary = summarize(job, engine, prepared.train_data)
    with RunOutput(run, reporter, is_first=engine.grid.rank == 0) as output:
        output.start(summary, continue_after=begin.step if prepared.reader is not None else None)
        for note in (*notes, *_resumed(prepared), *(f"kernel of {name}" for name in engine.kernels)):
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
        watchdog.beat("exporting", may_take_long=True)
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
    return Saver(engine, job.model, options, origin, job.adapters)


def _export(job: Job, engine: Engine, data: Dataset, output: RunOutput) -> None:
    section = job.run.export
    if section is None:
        return
    export_live(engine, job, section)
    what = "a directory of peft" if job.adapters is not None and not section.merge else "a Hugging Face directory"
    output.note(f"exported {what}: {section.path}")
    if section.check:
        batch = collate(data, range(job.run.train.micro_batch_size))
        error = check_export(engine, job, section, batch)
        output.note(f"what transformers predicts from it equals the live model's: relative error {error:.1e}")
