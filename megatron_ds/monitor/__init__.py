"""What a run tells about itself: its metrics file, its speed, its loss curve, and the voice it reports through."""

from megatron_ds.monitor.metrics import MetricsWriter, StepMetrics, ValidMetrics, iter_metrics, read_metrics
from megatron_ds.monitor.plot import draw_loss
from megatron_ds.monitor.reporter import Reporter, RunSummary, SilentReporter
from megatron_ds.monitor.throughput import Throughput, model_flops_per_token

__all__ = [
    "MetricsWriter",
    "Reporter",
    "RunSummary",
    "SilentReporter",
    "StepMetrics",
    "Throughput",
    "ValidMetrics",
    "draw_loss",
    "iter_metrics",
    "model_flops_per_token",
    "read_metrics",
]
