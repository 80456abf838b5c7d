"""Check names and options of registered components in the run file, before anything is allocated.

`runtime.setup.plan_engine` checks those that the engine uses.
"""

from __future__ import annotations

from megatron_ds.config import RunConfig, check_option_values
from megatron_ds.engine import OPTIMIZERS, GuardedOptimizer, state_kinds_of
from megatron_ds.errors import ConfigError
from megatron_ds.monitor import check_sinks
from megatron_ds.registry import check_options
from megatron_ds.training.callbacks import CALLBACKS
from megatron_ds.training.lr_schedule import SCHEDULES


def check_registered_names(run: RunConfig, *, resumes: bool) -> None:
    """Check schedule, optimizer, metric sinks and callbacks of a run, and that checkpoints can hold its optimizer.

    Args:
        run: the run file.
        resumes: whether the run reads the training state of a checkpoint.

    Raises:
        ConfigError: a name is not registered, an option is unknown, missing or wrong, nothing says which state the
            optimizer has, or a tracker's package is not installed.
    """
    schedule = SCHEDULES.get(run.schedule.name, "schedule.name")
    check_options(schedule, 1, run.schedule.options, "schedule.options")
    check_option_values(schedule, run.schedule.options, "schedule.options")
    optimizer = OPTIMIZERS.get(run.optimizer.name, "optimizer.name")
    check_options(optimizer.from_section, 3, run.optimizer.options, "optimizer.options")
    check_option_values(optimizer.from_section, run.optimizer.options, "optimizer.options")
    if state_kinds_of(run.optimizer) is None:
        _refuse_state(run, optimizer, resumes=resumes)
    check_sinks(run)
    for number, entry in enumerate(run.callbacks):
        field = f"callbacks[{number}]"
        check_options(CALLBACKS.get(entry.name, field), 0, entry.options, field)


def _refuse_state(run: RunConfig, optimizer: type[GuardedOptimizer], *, resumes: bool) -> None:
    """Refuse what needs to know the state of an optimizer that does not list it."""
    if run.checkpoint.every or resumes:
        fix = "checkpoint.every=0" if run.checkpoint.every else "checkpoint.resume=never"
        raise ConfigError(
            f"optimizer.name={run.optimizer.name} can be neither saved nor resumed: {optimizer.why_unsaved}; try {fix}"
        )
    creates_state = optimizer.kinds_in is not GuardedOptimizer.kinds_in
    if run.train.ema is not None and not creates_state:  # torch's optimizers take a state with an average for theirs
        raise ConfigError(
            f"train.ema: optimizer.name={run.optimizer.name} has no place for it: {optimizer.why_unsaved}; remove it"
        )
