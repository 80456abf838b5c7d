"""Display of a run on rank 0: a summary, then a progress bar on a terminal, a plain line per logged step elsewhere.

Everything goes to stdout, errors to stderr. No thread redraws the bar: data loader workers are forked from this
process, and a fork while another thread holds a lock can hang.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from megatron_ds.monitor.metrics import MOE, StepMetrics, ValidMetrics
from megatron_ds.monitor.reporter import Reporter, RunSummary
from megatron_ds.monitor.summary_text import format_count, format_duration, summary_rows

REDRAW_S = 0.1  # minimum time between two redraws of the bar
MIN_BAR_WIDTH = 6  # four cells and a space on either side
WINDOW_REPORTS = 100  # number of logged steps over which the pace is measured


def print_error(message: str, prefix: str = "") -> None:
    """Print `error: <message>` to stderr as exactly one line, in colour on a terminal unless NO_COLOR is set."""
    lines = (line.strip() for line in message.splitlines())
    text = " ".join(line for line in lines if line)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if console.is_terminal:
        console.print(Text(prefix).append("error:", style="bold red").append(f" {text}"))
    else:
        print(f"{prefix}error: {text}", file=sys.stderr, flush=True)


class TerminalReporter(Reporter):
    """Reporter for a terminal. Use it as a context manager, so that the terminal is restored after an error.

    Args:
        console: where to write; default stdout. A terminal gets a progress bar, other outputs plain lines.
        clock: monotonic time in seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._pace = Pace()
        self._widths: dict[str, int] = {}
        self._total_steps = 0
        self._progress: Progress | None = None
        self._drawn_at = -math.inf
        self._moved_handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def start(self, summary: RunSummary) -> None:
        """Show the summary and, on a terminal, an empty bar."""
        self._total_steps, self._pace = summary.steps, Pace(summary.full_batches)
        rows = summary_rows(summary)
        if not self._console.is_interactive:
            for name, value in rows:
                self._line(f"{name:<{NAME_WIDTH}}{value}")
            return
        table = Table.grid(padding=0)
        table.add_column(style="bold", width=NAME_WIDTH)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value))
        self._console.print(table)
        self._start_bar()

    def step(self, metrics: StepMetrics, total_steps: int) -> None:
        """Move the bar, or print a line."""
        self._total_steps = total_steps
        now = self._clock()
        left_s = self._pace.time_left_s(metrics, total_steps, now)
        if self._progress is None:
            self._line(self._plain_step(metrics, left_s))
            return
        room = self._console.width - len(f"step {metrics.step}/{total_steps}") - MIN_BAR_WIDTH
        status = bar_status(metrics, left_s, room)
        self._progress.update(self._progress.task_ids[0], completed=metrics.step, total=total_steps, status=status)
        if now - self._drawn_at >= REDRAW_S or metrics.step >= total_steps:
            self._drawn_at = now
            self._progress.refresh()

    def valid(self, metrics: ValidMetrics) -> None:
        """Print a line, above the bar if there is one."""
        loss = self._padded("loss", format_number(metrics.valid_loss, 4))
        of_sets = [f"{name} {format_number(value, 4)}" for name, value in metrics.valid_losses.items()]
        columns = (f"valid {self._count(metrics.step)}", f"loss {loss}", *of_sets, *self._averages(metrics.metrics))
        self._line("  ".join(columns))

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._line(text)

    def finish(self, text: str) -> None:
        """Leave the bar as it stands and print `text` under it."""
        self.close()
        self._line(text)

    def close(self) -> None:
        """Stop the bar and restore the log handlers; may be called twice."""
        if self._progress is None:
            return
        for handler, stream in self._moved_handlers:
            handler.setStream(stream)
        self._moved_handlers.clear()
        self._progress.stop()
        self._progress = None

    def __enter__(self) -> "TerminalReporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_bar(self) -> None:
        column = Column(no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}", table_column=column, markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", table_column=column.copy(), markup=False),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        self._progress.add_task("train", total=self._total_steps, status="")
        before = (sys.stdout, sys.stderr)
        self._progress.start()
        self._move_handlers(before, (sys.stdout, sys.stderr))

    def _move_handlers(self, before: tuple[Any, Any], after: tuple[Any, Any]) -> None:
        """Redirect log handlers, which keep their stream, to the stream that prints above the bar."""
        known = [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
        for handler in {handler for logger in [logging.getLogger(), *known] for handler in logger.handlers}:
            if not isinstance(handler, logging.StreamHandler):
                continue
            for old, new in zip(before, after):
                if handler.stream is old and new is not old:
                    self._moved_handlers.append((handler, old))
                    handler.setStream(new)
                    break

    def _plain_step(self, metrics: StepMetrics, left_s: float) -> str:
        columns = (
            f"step  {self._count(metrics.step)}",
            f"loss {self._padded('loss', format_number(metrics.loss, 4))}",
            *self._averages(metrics.metrics),
            *self._load(metrics),
            f"grad {self._padded('grad', format_number(metrics.grad_norm, 3))}",
            f"lr {metrics.lr:.2e}",
            f"{self._padded('tokens', format_rate(metrics.tokens_per_s))} tok/s",
            f"{self._padded('tflops', format_number(metrics.tflops_per_rank, 2))} TFLOP/s/rank",
            *self._device_use(metrics),
            f"left {self._padded('left', format_duration(left_s))}",
        )
        return "  ".join(columns)

    def _averages(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the objective's metrics as columns, such as `accuracy 0.4321`."""
        shown = averages(metrics)
        return [f"{name} {self._padded(f'metric {name}', format_number(one, 4))}" for name, one in shown.items()]

    def _load(self, metrics: StepMetrics) -> list[str]:
        """Return the load of the busiest expert as a column, if there are experts."""
        text = format_load(metrics)
        return [f"load {self._padded('load', text)}"] if text is not None else []

    def _device_use(self, metrics: StepMetrics) -> list[str]:
        """Return the step's MFU and peak memory as columns, as far as they are known."""
        return [f"{name} {self._padded(name, text)}" for name, text in device_use(metrics).items()]

    def _count(self, step: int) -> str:
        total = str(self._total_steps)
        return f"{step:>{len(total)}}/{total}"

    def _padded(self, column: str, text: str) -> str:
        """Return `text` right-aligned to the widest text that its column has shown so far."""
        self._widths[column] = max(self._widths.get(column, 0), len(text))
        return text.rjust(self._widths[column])

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class Pace:
    """Estimate of the time left, from the wall-clock time of the latest logged steps; validation and saving count."""

    def __init__(self, full_batches: Callable[[int], float] = float) -> None:
        """Begin without reports.

        Args:
            full_batches: number of steps -> how many full batches they are, to which their time is proportional.
        """
        self._full_batches = full_batches
        self._reports: deque[tuple[float, float]] = deque(maxlen=WINDOW_REPORTS)

    def time_left_s(self, metrics: StepMetrics, total_steps: int, now_s: float) -> float:
        """Return the seconds to the last step. `metrics.step` ended at `now_s`; the first estimate uses `step_s`."""
        done = self._full_batches(metrics.step)
        self._reports.append((done, now_s))
        first, first_s = self._reports[0]
        if done > first:
            batch_s = (now_s - first_s) / (done - first)
        else:
            batch_s = metrics.step_s / (done - self._full_batches(metrics.step - 1))
        return max(0.0, self._full_batches(total_steps) - done) * batch_s


NAME_WIDTH = 12


def bar_status(metrics: StepMetrics, left_s: float, width: int) -> str:
    """Return the text to the right of the bar, in `width` characters; the least important fields are dropped first."""
    shown = {f"metric {name}": f"{name} {format_number(one, 4)}" for name, one in averages(metrics.metrics).items()}
    load = format_load(metrics)
    fields = {
        "loss": f"loss {format_number(metrics.loss, 4)}",
        **shown,
        **({"load": f"load {load}"} if load is not None else {}),
        "lr": f"lr {metrics.lr:.2e}",
        "rate": f"{format_rate(metrics.tokens_per_s)} tok/s",
        **{name: f"{name} {text}" for name, text in device_use(metrics).items()},
        "left": f"left {format_duration(left_s)}",
    }
    for less_important in ("peak", "MFU", *reversed(shown), "lr", "load", "rate", "left"):
        if len("  ".join(fields.values())) > width:
            fields.pop(less_important, None)
    return "  ".join(fields.values())


def averages(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that a line names one by one; those of experts are too many."""
    return {name: value for name, value in metrics.items() if not name.startswith(MOE)}


def format_load(metrics: StepMetrics) -> str | None:
    """Format the tokens of the busiest expert of any layer as a multiple of the mean: 1.32x; None without experts."""
    loads = metrics.expert_loads
    return f"{loads[1]:.2f}x" if loads is not None else None


def device_use(metrics: StepMetrics) -> dict[str, str]:
    """Return a step's MFU and peak memory by name, such as `{"MFU": "48.1%", "peak": "61.2 GB"}`, as far as known."""
    found = {}
    if metrics.mfu is not None:
        found["MFU"] = f"{metrics.mfu:.1%}"
    if metrics.peak_memory_bytes is not None:
        found["peak"] = format_gigabytes(metrics.peak_memory_bytes)
    return found


def format_gigabytes(num_bytes: int) -> str:
    """Format a memory size in GB (1e9 bytes) with three digits: 0.52 GB, 6.12 GB, 61.2 GB."""
    size = num_bytes / 1e9
    return f"{size:.{2 if size < 10 else 1}f} GB"


def format_number(value: float, digits: int) -> str:
    """Format with `digits` decimals, or a few significant digits for very small or large values; NaN as `nan`."""
    if value == 0 or not math.isfinite(value) or 10.0 ** (1 - digits) <= abs(value) < 1e4:
        return f"{value:.{digits}f}"
    return f"{value:.2g}" if 1e-4 <= abs(value) < 1 else f"{value:.2e}"


def format_rate(per_s: float) -> str:
    """Format a rate in few characters: 8.5, 4,321, 12.3M."""
    if per_s >= 1e6 or not math.isfinite(per_s):
        return format_count(per_s)
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.1f}"
