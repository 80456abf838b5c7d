"""Metric sinks: further destinations of the lines of `metrics.jsonl`.

A sink is named under `monitor` in the run file and opened on rank 0 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_ds.config import RunConfig
from megatron_ds.monitor.metrics import Metrics
from megatron_ds.registry import Registry


@dataclass(frozen=True)
class SinkInfo:
    """The run that a sink is opened for.

    Attributes:
        run: the run file.
        output: the run's directory, which exists.
        continue_after: the step that a resumed run continues after; None for a new run. Steps after it may have been
            written before.
    """

    run: RunConfig
    output: Path
    continue_after: int | None


class MetricSink(Protocol):
    """Receiver of every logged step and every validation. An exception in it ends the run with its traceback."""

    def write(self, metrics: Metrics) -> None:
        """Write a `StepMetrics` or a `ValidMetrics`."""

    def close(self) -> None:
        """Close the sink; called once, at the run's end or after an error."""


SINKS: Registry[Callable[..., MetricSink]] = Registry("metric sink")
"""Name -> a class or function, called as (SinkInfo, **options)."""


def open_sinks(info: SinkInfo) -> list[MetricSink]:
    """Return the sinks that the run file names.

    Raises:
        ConfigError: no sink of such a name is registered.
    """
    return [
        SINKS.get(entry.name, f"monitor[{number}]")(info, **entry.options)
        for number, entry in enumerate(info.run.monitor)
    ]
