"""Built-in metric sinks: each module registers one under the name of its package."""

from megatron_ds.monitor.trackers import csv, mlflow, tensorboard, trackio, wandb

__all__ = ["csv", "mlflow", "tensorboard", "trackio", "wandb"]
