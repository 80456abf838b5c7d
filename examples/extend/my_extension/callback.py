"""The callback `stop_when_flat`: end the run when the validation loss no longer falls."""

from __future__ import annotations

import math

from megatron_ds.training.callbacks import CALLBACKS, Callback, RunState


@CALLBACKS.register("stop_when_flat")
class StopWhenFlat(Callback):
    """Stops after `patience` validations in a row without a lower loss, and logs the lowest one."""

    def __init__(self, patience: int = 3) -> None:
        self.patience, self.best, self.num_flat = patience, math.inf, 0

    def on_validation_end(self, state: RunState) -> None:
        """Compare with the lowest validation loss; every rank sees the same loss."""
        assert state.valid is not None
        falls = state.valid.valid_loss < self.best
        self.best = min(self.best, state.valid.valid_loss)
        self.num_flat = 0 if falls else self.num_flat + 1
        state.log(best_valid_loss=self.best)
        if self.num_flat >= self.patience:
            state.stop()
