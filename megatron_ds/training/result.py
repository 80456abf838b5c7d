"""The result of a training run, returned by `megatron_ds.train`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """Outcome of one call of `train`; the same on every rank.

    Attributes:
        steps: optimizer steps of the run so far, those before a resume included.
        last_loss, best_loss: training loss of the last step of this call and the lowest of its steps; None if this call
            did no step.
        last_valid_loss, best_valid_loss: the same for its validations.
        last_valid_metrics: metrics of its last validation by name; empty if it has no metrics.
        output: the run's directory.
        metrics: its `metrics.jsonl`.
        checkpoint: the last checkpoint that this call saved or resumed from; None if there is no checkpoint.
        export: the Hugging Face directory that this call wrote; None if it exported nothing.
    """

    steps: int
    last_loss: float | None
    best_loss: float | None
    last_valid_loss: float | None
    best_valid_loss: float | None
    output: Path
    metrics: Path
    checkpoint: Path | None
    export: Path | None
    last_valid_metrics: Mapping[str, float] = field(default_factory=dict)


class LossHistory:
    """The last and the lowest value of a loss. Values that are not finite never count as the lowest."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.best: float | None = None

    def add(self, loss: float) -> None:
        """Record the loss of a step or validation."""
        self.last = loss
        if math.isfinite(loss) and (self.best is None or loss < self.best):
            self.best = loss
