"""What a run tells while it goes on: `config.yaml`, `metrics.jsonl` and `loss.png` in its directory, and a reporter."""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType

from megatron_ds.config import RunConfig, dump_run
from megatron_ds.monitor import MetricsWriter, Reporter, RunSummary, StepMetrics, ValidMetrics, draw_loss


class RunOutput:
    """Rank 0's files and voice; on other ranks every method does nothing. Use it as a context manager.

    Args:
        run: what is run.
        reporter: who is told.
        is_first: whether this is rank 0.
    """

    def __init__(self, run: RunConfig, reporter: Reporter, is_first: bool) -> None:
        self._run, self._reporter, self._is_first = run, reporter, is_first
        self._directory = Path(run.output)
        self._writer: MetricsWriter | None = None
        self._told_non_finite = False

    def start(self, summary: RunSummary) -> None:
        """Make the directory, write `config.yaml`, open `metrics.jsonl`, show the summary."""
        if not self._is_first:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "config.yaml").write_text(dump_run(self._run), encoding="utf-8")
        self._writer = MetricsWriter(self._directory / "metrics.jsonl")
        self._reporter.start(summary)

    def step(self, metrics: StepMetrics) -> None:
        """Write and show a logged step."""
        self._write(metrics)
        if self._is_first:
            self._reporter.step(metrics, self._run.train.steps)

    def valid(self, metrics: ValidMetrics) -> None:
        """Write and show a validation."""
        self._write(metrics)
        if self._is_first:
            self._reporter.valid(metrics)

    def watch(self, step: int, loss: float) -> None:
        """Say so, once, when a loss is not finite; the run goes on, and its metrics show what becomes of it."""
        if self._is_first and not self._told_non_finite and not math.isfinite(loss):
            self._told_non_finite = True
            self._reporter.note(f"step {step}: the loss is {loss}; the run goes on, but look at lr and data")

    def note(self, text: str) -> None:
        """Say something worth a line."""
        if self._is_first:
            self._reporter.note(text)

    def close(self, title: str) -> None:
        """Close `metrics.jsonl` and draw `loss.png` from it."""
        if self._writer is not None:
            self._writer.close()
            draw_loss(self._writer.path, self._directory / "loss.png", f"{title}: {self._directory}")

    def finish(self, text: str) -> None:
        """Say how it went."""
        if self._is_first:
            self._reporter.finish(text)

    def __enter__(self) -> RunOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, metrics: StepMetrics | ValidMetrics) -> None:
        if self._writer is not None:
            self._writer.write(metrics)
