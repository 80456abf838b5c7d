"""One rank's part of a training run."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ds.config import RunConfig, dump_run
from megatron_ds.data import Dataset, GlobalBatches, collate, for_data_rank, open_dataset, ordered_pass
from megatron_ds.engine import (
    Engine,
    EngineOptions,
    build_engine,
    device_type,
    start_distributed,
    stop_distributed,
)
from megatron_ds.models.gpt import decoder_stages
from megatron_ds.monitor import (
    MetricsWriter,
    Reporter,
    RunSummary,
    StepMetrics,
    Throughput,
    ValidMetrics,
    draw_loss,
    model_flops_per_token,
)
from megatron_ds.parallel.collectives import all_reduce_
from megatron_ds.parallel.grid import create_grid
from megatron_ds.parallel.launch import RankInfo
from megatron_ds.train.export import check_export, export_live
from megatron_ds.train.job import Job, resolve
from megatron_ds.train.schedule import learning_rate


def train_rank(run: RunConfig, info: RankInfo, reporter: Reporter) -> None:
    """Train as one rank of a job: check, read data, join the others, train, export.

    Raises:
        MegatronDSError: what the user can mend, before the process group exists wherever possible.
        KeyboardInterrupt: after SIGINT, once every rank has finished its step and the files are closed.
    """
    job = resolve(run, info.world_size, device_type())
    train_data = _open(job, "train")
    valid_data = _open(job, "valid") if run.data.valid else None
    device = start_distributed(info)
    try:
        grid = create_grid(job.layout, info.rank)
        options = EngineOptions(
            job.deepspeed, run.optimizer, run.parallel.sequence, run.train.recompute, run.train.seed
        )
        engine = build_engine(
            lambda at: decoder_stages(job.model.decoder, at),
            grid,
            device,
            options,
            job.weights.share if job.weights is not None else None,
        )
        _Training(job, engine, train_data, valid_data, reporter).run()
    finally:
        stop_distributed()


def _open(job: Job, split: str) -> Dataset:
    data = job.run.data
    return open_dataset(
        data.format,
        [source.path for source in getattr(data, split)],
        data.seq_length,
        job.model.decoder.vocab_size,
        job.run.model.tokenizer_path,
        data.cache_dir,
    )


@dataclass
class _Training:
    """The loop and what it touches at each step."""

    job: Job
    engine: Engine
    train_data: Dataset
    valid_data: Dataset | None
    reporter: Reporter

    def run(self) -> None:
        run, output = self.job.run, Path(self.job.run.output)
        num_params = self.engine.num_params
        self.throughput = Throughput(self._flops_per_token(num_params), self.job.layout.world_size)
        self.is_first = self.engine.grid.rank == 0
        self.writer: MetricsWriter | None = None
        if self.is_first:
            output.mkdir(parents=True, exist_ok=True)
            (output / "config.yaml").write_text(dump_run(run), encoding="utf-8")
            self.writer = MetricsWriter(output / "metrics.jsonl")
            self.reporter.start(self._summary(num_params))
        try:
            with _interruptible() as wants_stop:
                done = self._steps(wants_stop)
        finally:
            if self.writer is not None:
                self.writer.close()
                draw_loss(
                    output / "metrics.jsonl", output / "loss.png", f"{self.job.model.family.model_type}: {output}"
                )
        if done < run.train.steps:
            self.reporter.finish(f"interrupted after step {done} of {run.train.steps}; metrics are in {output}")
            raise KeyboardInterrupt
        self._export()
        self.reporter.finish(f"done: {run.train.steps} steps; metrics and loss.png are in {output}")

    def _steps(self, wants_stop: list[bool]) -> int:
        """Train; returns the number of steps done."""
        run = self.job.run
        batches = GlobalBatches(len(self.train_data), run.train.global_batch_size, run.train.seed, run.data.shuffle)
        applied = 0
        for step in range(1, run.train.steps + 1):
            began = time.perf_counter()
            lr = learning_rate(applied, run.train.steps, run.optimizer, run.schedule)
            result = self.engine.train_step(self._micro_batches(self.train_data, batches.indices(step - 1)), lr)
            applied += result.applied
            if step % run.train.log_every == 0 or step in (1, run.train.steps):
                seconds = time.perf_counter() - began
                processed = run.train.global_batch_size * run.data.seq_length
                metrics = StepMetrics(
                    step=step,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    lr=lr,
                    tokens=result.tokens,
                    step_s=seconds,
                    tokens_per_s=result.tokens / seconds,
                    tflops_per_rank=self.throughput.rates(processed, seconds).tflops_per_rank,
                )
                if self.writer is not None:
                    self.writer.write(metrics)
                self.reporter.step(metrics, run.train.steps)
            every = run.train.eval_every
            if self.valid_data is not None and every and (step % every == 0 or step == run.train.steps):
                self._validate(self.valid_data, step)
            if self._all_agree_to_stop(wants_stop[0]):
                return step
        return run.train.steps

    def _validate(self, data: Dataset, step: int) -> None:
        loss, tokens = 0.0, 0
        for indices in ordered_pass(len(data), self.job.run.train.global_batch_size):
            part_loss, part_tokens = self.engine.evaluate(self._micro_batches(data, indices))
            loss, tokens = loss + part_loss, tokens + part_tokens
        metrics = ValidMetrics(step, loss / max(tokens, 1))
        if self.writer is not None:
            self.writer.write(metrics)
        self.reporter.valid(metrics)

    def _micro_batches(self, data: Dataset, indices: Any) -> list[dict[str, torch.Tensor]]:
        axis = self.engine.grid.data
        parts = for_data_rank(indices, axis.rank, axis.size, self.job.run.train.micro_batch_size)
        return [collate(data, part) for part in parts]

    def _all_agree_to_stop(self, wants_stop: bool) -> bool:
        flag = torch.tensor(int(wants_stop), device=self.engine.device)
        return bool(all_reduce_(flag, self.engine.grid.world))

    def _export(self) -> None:
        section = self.job.run.export
        if section is None:
            return
        export_live(self.engine, self.job, section)
        self.reporter.note(f"exported a Hugging Face directory: {section.path}")
        if section.check:
            ids = collate(self.train_data, range(self.job.run.train.micro_batch_size))["input_ids"]
            error = check_export(self.engine, self.job, section, ids)
            self.reporter.note(f"transformers' logits on it equal the live model's: relative error {error:.1e}")

    def _flops_per_token(self, num_params: int) -> float:
        decoder = self.job.model.decoder
        looked_up = 0 if decoder.tied else decoder.vocab_size * decoder.hidden_size
        if decoder.rotary is None:
            looked_up += decoder.max_positions * decoder.hidden_size
        width = decoder.num_heads * decoder.head_dim
        return model_flops_per_token(num_params - looked_up, decoder.num_layers, width, self.job.run.data.seq_length)

    def _summary(self, num_params: int) -> RunSummary:
        job, run = self.job, self.job.run
        return RunSummary(
            model_name=job.model.family.model_type,
            num_params=num_params,
            world_size=job.layout.world_size,
            tensor=job.layout.tensor,
            pipeline=job.layout.pipeline,
            data=job.layout.data,
            sequence=run.parallel.sequence,
            zero_stage=job.facts.zero_stage,
            precision=job.facts.precision,
            device=_device_words(self.engine.device),
            tokens_per_step=run.train.global_batch_size * run.data.seq_length,
            steps=run.train.steps,
            data_description=self.train_data.describe(),
            output=run.output,
        )


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """Within it the first SIGINT sets the flag that the loop reads after a step; the second ends the process."""
    wants_stop = [False]

    def on_interrupt(number: int, frame: Any) -> None:
        if wants_stop[0]:
            os._exit(130)
        wants_stop[0] = True

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield wants_stop
    finally:
        signal.signal(signal.SIGINT, before)


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads a rank)"
