"""Callbacks: code that a training run calls at its events.

A callback is named under `callbacks` in the run file, where it is registered in `CALLBACKS`, or given to `train` as an
object. Every rank has its own and calls it at the same points in the same order, so a callback may communicate, and a
request of any rank is carried out on all. An exception in a callback ends the run with its traceback. The state of a
callback is not saved in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_ds.checkpoint.saver import Saved
from megatron_ds.config import RunConfig
from megatron_ds.engine import Engine
from megatron_ds.errors import ConfigError
from megatron_ds.monitor import StepMetrics, ValidMetrics
from megatron_ds.registry import Registry

STOP, SAVE, VALIDATE = "stop", "save", "validate"


class RunState:
    """The state of a run for its callbacks. Attributes are read-only; methods request a change.

    Attributes:
        run: the run file.
        engine: the model under DeepSpeed; its methods are collective.
        rank: global rank of this process.
        step: number of optimizer steps done, those before a resume included.
        metrics: metrics of the last step, logged or not; loss and gradient norm are the same on all ranks, times are
            this rank's. None before the first step.
        applied: whether the last step changed the weights; False if it was skipped.
        valid: metrics of the last validation; None before the first.
        saved: the last checkpoint that was written completely; None before the first.
        stopped_by: at the run's end, what stopped it before its last step; None = it was not stopped.
        exported: at the run's end, the Hugging Face directory that was written; None = none.
        can_save, can_validate: whether the run has checkpoints and validation data.
    """

    def __init__(self, run: RunConfig, engine: Engine, can_save: bool = False, can_validate: bool = False) -> None:
        self.run, self.engine, self.rank = run, engine, engine.grid.rank
        self.step = 0
        self.metrics: StepMetrics | None = None
        self.applied = True
        self.valid: ValidMetrics | None = None
        self.saved: Saved | None = None
        self.stopped_by: str | None = None
        self.exported: Path | None = None
        self.can_save, self.can_validate = can_save, can_validate
        self._requests: set[str] = set()
        self._logged: dict[str, float] = {}

    def stop(self) -> None:
        """Request a stop after this step. The run saves, if it has checkpoints, and exits with status 0."""
        self._requests.add(STOP)

    def save(self) -> None:
        """Request a checkpoint after this step.

        Raises:
            ConfigError: the run has no checkpoints.
        """
        if not self.can_save:
            raise ConfigError(
                "checkpoint.every=0 saves nothing, and a callback requests a checkpoint; try checkpoint.every=1000"
            )
        self._requests.add(SAVE)

    def validate(self) -> None:
        """Request a validation after this step.

        Raises:
            ConfigError: the run has no validation data.
        """
        if not self.can_validate:
            raise ConfigError("data.valid is empty, and a callback requests a validation; name at least one file")
        self._requests.add(VALIDATE)

    def log(self, **metrics: float) -> None:
        """Add numbers to `metrics` of the next logged step; a later value replaces an earlier one of the same name.

        The values of rank 0 are written. A callback reduces values that differ by rank itself.
        """
        self._logged.update(metrics)


class Callback:
    """Base class of callbacks. Override the methods that you need; every method is called on every rank."""

    def on_run_start(self, state: RunState) -> None:
        """Act before the first step, after a checkpoint was read. Requests are carried out after that step."""

    def on_step_end(self, state: RunState) -> None:
        """Act after each optimizer step, skipped ones too, before its metrics are written."""

    def on_validation_end(self, state: RunState) -> None:
        """Act after each complete validation. Requests are carried out before the next step."""

    def on_checkpoint_saved(self, state: RunState) -> None:
        """Act when all files of a checkpoint are written, which may be some steps after the save began.

        Requests are carried out after the next step.
        """

    def on_run_end(self, state: RunState) -> None:
        """Act after the last step and the export, or after a stop; not after an error. Requests have no effect."""


CALLBACKS: Registry[Callable[..., Callback]] = Registry("callback")


def make_callbacks(run: RunConfig) -> list[tuple[str, Callback]]:
    """Return the run file's callbacks with their names.

    Raises:
        ConfigError: a name is not registered.
    """
    return [
        (entry.name, CALLBACKS.get(entry.name, f"callbacks[{number}]")(**entry.options))
        for number, entry in enumerate(run.callbacks)
    ]


class CallbackList:
    """The callbacks of a run on one rank, and the requests that they have made.

    Args:
        state: the state that they receive.
        callbacks: (name, callback) pairs in the order in which they are called.
    """

    def __init__(self, state: RunState, callbacks: Sequence[tuple[str, Callback]] = ()) -> None:
        self.state, self._callbacks = state, callbacks
        self._wants_stop = self._stopped = 0  # number, from 1, of the stopping callback: on this rank, on any rank
        self._agreed: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def run_start(self, step: int) -> None:
        """Call `on_run_start` after `step` optimizer steps."""
        self.state.step = step
        self._call(lambda callback: callback.on_run_start)

    def step_end(self, metrics: StepMetrics, applied: bool) -> None:
        """Call `on_step_end`."""
        self.state.step, self.state.metrics, self.state.applied = metrics.step, metrics, applied
        self._call(lambda callback: callback.on_step_end)

    def validation_end(self, valid: ValidMetrics) -> None:
        """Call `on_validation_end`."""
        self.state.valid = valid
        self._call(lambda callback: callback.on_validation_end)

    def checkpoint_saved(self, saved: Saved) -> None:
        """Call `on_checkpoint_saved`."""
        self.state.saved = saved
        self._call(lambda callback: callback.on_checkpoint_saved)

    def run_end(self, stopped_by: str | None = None, exported: str | None = None) -> None:
        """Call `on_run_end`."""
        self.state.stopped_by = stopped_by
        self.state.exported = Path(exported) if exported is not None else None
        self._call(lambda callback: callback.on_run_end)

    def take_logged(self) -> Mapping[str, float]:
        """Return the numbers that were logged since the last call."""
        logged, self.state._logged = self.state._logged, {}
        return logged

    # ---- requests ------------------------------------------------------------------------------------------------

    @property
    def flags(self) -> list[int]:
        """This rank's requests, to be combined over all ranks by their maximum; empty without callbacks."""
        requests = self.state._requests
        return [self._wants_stop, int(SAVE in requests), int(VALIDATE in requests)] if self._callbacks else []

    def agree(self, flags: Sequence[int]) -> None:
        """Replace this rank's requests by the combined flags of all ranks."""
        self.state._requests.clear()
        self._wants_stop = 0
        if flags:
            self._stopped = flags[0]
            self._agreed |= {name for name, flag in zip((SAVE, VALIDATE), flags[1:]) if flag}

    @property
    def stopped_by(self) -> str | None:
        """Name of the callback that requested a stop, on any rank; None = no callback did. Set by `agree`."""
        return self._callbacks[self._stopped - 1][0] if self._stopped else None

    def take(self, request: str) -> bool:
        """Return whether any rank has requested SAVE or VALIDATE, and clear the request."""
        found = request in self._agreed
        self._agreed.discard(request)
        return found

    def _call(self, method: Callable[[Callback], Callable[[RunState], None]]) -> None:
        for number, (_, callback) in enumerate(self._callbacks, start=1):
            method(callback)(self.state)
            if STOP in self.state._requests and not self._wants_stop:
                self._wants_stop = number
