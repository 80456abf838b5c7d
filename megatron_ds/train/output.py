"""What a run tells while it goes on: `config.yaml`, `metrics.jsonl` and `loss.png` in its directory, and a reporter."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from megatron_ds.checkpoint.saver import Saved
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

    def start(self, summary: RunSummary, continue_after: int | None = None) -> None:
        """Make the directory, write `config.yaml`, open `metrics.jsonl`, show the summary.

        Args:
            summary: of the run.
            continue_after: the step that a resumed run goes on after; None for a new run.
        """
        if not self._is_first:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "config.yaml").write_text(dump_run(self._run), encoding="utf-8")
        self._writer = MetricsWriter(self._directory / "metrics.jsonl", continue_after)
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

    def saved(self, saved: Saved) -> None:
        """Show a checkpoint that is there, and write what it cost to `checkpoints/saves.jsonl`."""
        if not self._is_first:
            return
        rate = saved.bytes / 1e6 / max(saved.written_s, 1e-9)
        self._reporter.note(
            f"saved {saved.path}: {saved.bytes / 1e6:,.1f} MB in {saved.written_s:.2f} s ({rate:,.0f} MB/s), training "
            f"paused {saved.paused_s:.2f} s"
        )
        with open(Path(saved.path).parent / "saves.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(saved)) + "\n")

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
