"""Output of a run: `config.yaml`, `metrics.jsonl`, `data.json`, `loss.png`, `report.html`, and a reporter.

Without a directory that can be written no run starts. Later, a full disk does not end it: lines wait for room, and the
other files are written again at the next occasion.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType

from megatron_ds.atomic import replacing
from megatron_ds.checkpoint.saver import Saved
from megatron_ds.config import RunConfig, dump_run
from megatron_ds.data import Dataset
from megatron_ds.data.blend import SourceUsage, source_usage
from megatron_ds.errors import ConfigError, DataError
from megatron_ds.log import get_logger
from megatron_ds.monitor import (
    MetricSink,
    MetricsWriter,
    Reporter,
    RunSummary,
    SinkInfo,
    StepMetrics,
    SystemMeter,
    Tracker,
    ValidMetrics,
    draw_loss,
    open_sinks,
)
from megatron_ds.monitor.line_file import LineFile
from megatron_ds.monitor.report import REPORT, write_end, write_report, write_start
from megatron_ds.monitor.stragglers import StragglersReport
from megatron_ds.training.model_paths import with_hub_names
from megatron_ds.training.resume import RUN_FILE
from megatron_ds.training.statement import describe_sources

DATA_USAGE = "data.json"
LOSS_PLOT = "loss.png"
STRAGGLERS = "stragglers.json"
SAVES = "saves.jsonl"
LONGEST_REASON = 500  # characters of an error in the report


class RunOutput:
    """Writer of run files and progress reports on rank 0; on other ranks every method does nothing. A context manager.

    Args:
        run: the run file.
        reporter: shows progress.
        is_first: whether this is rank 0.
    """

    def __init__(self, run: RunConfig, reporter: Reporter, is_first: bool) -> None:
        self._run, self._reporter, self._is_first = run, reporter, is_first
        self._directory = Path(run.output)
        self._writer: MetricsWriter | None = None
        self._sinks: list[MetricSink] = []
        self._system: SystemMeter | None = None
        self._last_step: int | None = None  # None = the run has not started
        self._saves: LineFile | None = None
        self._reported: set[str] = set()

    def start(self, summary: RunSummary, continue_after: int | None = None) -> None:
        """Make the directory, write `config.yaml`, open `metrics.jsonl` and other sinks, show the summary.

        Args:
            summary: facts about the run.
            continue_after: the last step before a resumed run; None for a new run.
        """
        if not self._is_first:
            return
        try:
            self._writer = self._open_metrics(continue_after)
        except OSError as problem:
            raise ConfigError(
                f"output={self._directory} cannot be written ({problem.strerror or problem}); choose another place"
            ) from problem
        self._sinks = open_sinks(SinkInfo(self._run, self._directory, continue_after, self._writer.found))
        if self._run.monitor or self._run.train.log_system:
            self._system = SystemMeter()
        write_start(self._directory, summary, continue_after)
        self._last_step = continue_after or 0
        self._reporter.start(summary)

    def _open_metrics(self, continue_after: int | None) -> MetricsWriter:
        """Make the directory, write `config.yaml`, and open `metrics.jsonl`."""
        self._directory.mkdir(parents=True, exist_ok=True)
        file, content = self._directory / RUN_FILE, dump_run(with_hub_names(self._run)).encode()
        if file.is_symlink() or not file.is_file() or file.read_bytes() != content:  # as a rule it is there already
            with replacing(file) as temporary:  # a link there is replaced, not what it leads to
                temporary.write_bytes(content)
        if continue_after is None:
            for name in (DATA_USAGE, STRAGGLERS):  # of an earlier run
                (self._directory / name).unlink(missing_ok=True)
        return MetricsWriter(self._directory / "metrics.jsonl", continue_after)

    @property
    def unwritten(self) -> str | None:
        """The reason why too many lines of metrics are not written, in words; None = all are, or they may wait."""
        return self._writer.unwritten if self._writer is not None else None

    def step(self, metrics: StepMetrics) -> None:
        """Write and show a logged step, with readings of the machine."""
        if self._system is not None:
            metrics = replace(metrics, system=self._system.take())
        self._write(metrics)
        self._last_step = metrics.step
        if self._is_first:
            self._reporter.step(metrics, self._run.train.num_steps)

    def valid(self, metrics: ValidMetrics) -> None:
        """Write and show a validation."""
        self._write(metrics)
        if self._is_first:
            self._reporter.valid(metrics)

    def saved(self, saved: Saved) -> None:
        """Report a complete checkpoint, and append its size and times to `checkpoints/saves.jsonl`."""
        if not self._is_first:
            return
        rate = saved.bytes / 1e6 / max(saved.written_s, 1e-9)
        self._reporter.note(
            f"saved {saved.path}: {saved.bytes / 1e6:,.1f} MB in {saved.written_s:.2f} s ({rate:,.0f} MB/s), training "
            f"paused {saved.paused_s:.2f} s"
        )
        self._saves = self._saves or LineFile(Path(saved.path).parent / SAVES)
        self._saves.add(json.dumps(asdict(saved)) + "\n")

    def write_usage(self, data: Dataset, samples: int, *, is_last: bool = False) -> None:
        """Write the number of samples read from each corpus to `data.json`, if the data count them.

        Args:
            data: training data of the run.
            samples: number of samples read so far.
            is_last: whether training has ended; the counts are then reported too.
        """
        usage = source_usage(data, samples) if self._is_first else ()
        if not usage:
            return
        content = json.dumps({"samples": samples, "sources": [asdict(source) for source in usage]}, indent=2)
        with self._spared(DATA_USAGE), replacing(self._directory / DATA_USAGE) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")
        if is_last:
            self._reporter.note(describe_usage(usage))

    def write_stragglers(self, report: StragglersReport) -> None:
        """Write what each rank spends its steps with to `stragglers.json`."""
        if not self._is_first:
            return
        content = json.dumps(asdict(report), indent=1)
        with self._spared(STRAGGLERS), replacing(self._directory / STRAGGLERS) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")

    def note(self, text: str) -> None:
        """Report a line of text."""
        if self._is_first:
            self._reporter.note(text)

    def close(self, title: str, outcome: str = "done") -> None:
        """Close `metrics.jsonl` and other sinks, draw `loss.png`, and record the end of the training.

        Args:
            title: of the picture.
            outcome: `done`, or `stopped by ...`.
        """
        if self._writer is not None:
            self._close()
            with self._spared(LOSS_PLOT):
                draw_loss(self._writer.path, self._directory / LOSS_PLOT, f"{title}: {self._directory}")
            write_end(self._directory, outcome)

    def finish(self, text: str) -> None:
        """Write `report.html`, and report the outcome of the run."""
        if self._writer is not None:
            with self._spared(REPORT):
                write_report(self._directory)
        if self._is_first:
            self._reporter.finish(text)

    def __enter__(self) -> RunOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(failed=error is not None)
        if error is not None and self._is_first and self._last_step is not None:
            self._report_failure(error)

    def _report_failure(self, error: BaseException) -> None:
        """Write the report of a run that an error ended. A further error, as of a full disk, must not replace it."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        with self._spared(REPORT):
            write_end(self._directory, f"failed after step {self._last_step}: {reason[:LONGEST_REASON]}")
            write_report(self._directory)

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """Report once that a file cannot be written which the run can do without."""
        try:
            yield
        except (OSError, DataError) as problem:
            if name not in self._reported:
                self._reported.add(name)
                get_logger().warning("%s could not be written (%s)", self._directory / name, problem)

    def _close(self, *, failed: bool = False) -> None:
        """Close all sinks that are still open."""
        if self._writer is not None:
            self._writer.close()
        if self._saves is not None:
            self._saves.close()
        while self._sinks:
            sink = self._sinks.pop()
            if isinstance(sink, Tracker):
                sink.failed = failed
            sink.close()

    def _write(self, metrics: StepMetrics | ValidMetrics) -> None:
        if self._writer is not None:
            self._writer.write(self._without_system(metrics))
        for sink in self._sinks:
            sink.write(metrics)

    def _without_system(self, metrics: StepMetrics | ValidMetrics) -> StepMetrics | ValidMetrics:
        """Return the metrics without the machine's readings, unless the run file asks for them."""
        if isinstance(metrics, StepMetrics) and not self._run.train.log_system:
            return replace(metrics, system={})
        return metrics


def describe_usage(usage: Sequence[SourceUsage]) -> str:
    """Return a line such as `data: a: 6,120 samples (0.61, wanted 0.60), 0.43 epochs; b: 3,880 samples ...`."""
    return f"data: {describe_sources(usage)}"
