"""Metric sinks: further destinations of the lines of `metrics.jsonl`.

A sink is named under `monitor` in the run file and opened on rank 0 alone. `trackers/` has those that are built in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_ds.config import RunConfig
from megatron_ds.monitor.metrics import LastSteps, Metrics
from megatron_ds.registry import Registry


@dataclass(frozen=True)
class SinkInfo:
    """The run that a sink is opened for.

    Attributes:
        run: the run file.
        output: the run's directory, which exists.
        continue_after: the step that a resumed run continues after; None for a new run. Steps after it may have been
            written before.
        written: the last steps that were written before the run was resumed, and may be after `continue_after`.
        number: index of the sink under `monitor`.
    """

    run: RunConfig
    output: Path
    continue_after: int | None
    written: LastSteps = field(default_factory=LastSteps)
    number: int = 0

    @property
    def entry(self) -> str:
        """The run file's entry with its name, such as `monitor[0]=wandb`."""
        return f"monitor[{self.number}]={self.run.monitor[self.number].name}"


class MetricSink(Protocol):
    """Receiver of every logged step and every validation. An exception in it ends the run with its traceback."""

    def write(self, metrics: Metrics) -> None:
        """Write a `StepMetrics` or a `ValidMetrics`."""

    def close(self) -> None:
        """Close the sink; called once, at the run's end or after an error."""


SINKS: Registry[Callable[..., MetricSink]] = Registry("metric sink")
"""Name -> a class or function, called as (SinkInfo, **options)."""
