"""A run's metrics and where they go: the metrics file, other sinks, the loss curve, and the reporter."""

from megatron_ds.monitor.memory import MemoryMeter
from megatron_ds.monitor.metrics import (
    MetricsWriter,
    StepMetrics,
    ValidMetrics,
    archive_name,
    iter_metrics,
    read_metrics,
)
from megatron_ds.monitor.open_sinks import check_sinks, open_sinks
from megatron_ds.monitor.peak_flops import peak_flops
from megatron_ds.monitor.plot import draw_loss
from megatron_ds.monitor.reporter import Reporter, RunSummary, SilentReporter
from megatron_ds.monitor.sinks import SINKS, MetricSink, SinkInfo
from megatron_ds.monitor.system import SystemMeter
from megatron_ds.monitor.throughput import Throughput, model_flops_per_token
from megatron_ds.monitor.trackers.tracker import Tracker

__all__ = [
    "SINKS",
    "MemoryMeter",
    "MetricSink",
    "MetricsWriter",
    "Reporter",
    "RunSummary",
    "SilentReporter",
    "SinkInfo",
    "StepMetrics",
    "SystemMeter",
    "Throughput",
    "Tracker",
    "ValidMetrics",
    "archive_name",
    "check_sinks",
    "draw_loss",
    "iter_metrics",
    "model_flops_per_token",
    "open_sinks",
    "peak_flops",
    "read_metrics",
]
