"""The learning rate: a function of the number of optimizer steps applied so far.

A custom schedule is a function of a `SchedulePoint`, registered in `SCHEDULES` (`training.schedules`).
"""

from __future__ import annotations

from megatron_ds.checkpoint.progress import Progress
from megatron_ds.config import OptimizerSection, RunConfig, ScheduleSection
from megatron_ds.training.schedules import SCHEDULES, SchedulePoint

__all__ = ["SCHEDULES", "SchedulePoint", "check_schedule", "describe_jump", "learning_rate"]

LARGEST_CHANGE = 0.01
"""Relative difference of two learning rates up to which a schedule continues."""


def learning_rate(applied: int, steps: int, optimizer: OptimizerSection, schedule: ScheduleSection) -> float:
    """Return the learning rate of the next step.

    Linear warm-up reaches `optimizer.lr` on step `warmup_steps` (the first step already has a positive rate); after
    it the schedule computes the rate.

    Args:
        applied: optimizer steps applied so far; one that DeepSpeed skipped for an fp16 overflow does not count, so the
            schedule does not advance on it.
        steps: number of steps of the run.
        optimizer: the section whose `lr` is the peak.
        schedule: the section with name, warm-up and options.

    Raises:
        ConfigError: no schedule has this name.
    """
    step = applied + 1
    if step <= schedule.warmup_steps:
        return optimizer.lr * step / schedule.warmup_steps
    point = SchedulePoint(step, steps, schedule.warmup_steps, optimizer.lr, schedule.min_lr)
    return SCHEDULES.get(schedule.name, "schedule.name")(point, **schedule.options)


def check_schedule(run: RunConfig) -> None:
    """Check the options of a schedule against the steps of a run, whose number is known.

    Raises:
        ConfigError: the schedule does not fit the run.
    """
    steps, warmup = run.train.num_steps, run.schedule.warmup_steps
    if steps > warmup:
        learning_rate(warmup, steps, run.optimizer, run.schedule)


def describe_jump(saved: Progress, run: RunConfig) -> str | None:
    """Return a line about a learning rate that does not continue that of the checkpoint which a run resumes.

    It jumps where `train.steps`, `optimizer.lr` or the schedule differ from those before: a schedule that had decayed
    is somewhere in its middle if there are more steps.

    Args:
        saved: progress of the checkpoint.
        run: the run file.

    Returns:
        None: the schedule continues, or no step is left.
    """
    steps = run.train.num_steps
    then = _last_rate(saved, run)
    if then is None or saved.step >= steps:
        return None
    last, following = saved.applied - 1, saved.applied
    same, now = (learning_rate(applied, steps, run.optimizer, run.schedule) for applied in (last, following))
    if abs(same - then) <= LARGEST_CHANGE * max(same, then):
        return None
    smooth = f", or continue with schedule.name=constant optimizer.lr={then:.3g}" if then else ""
    return (
        f"the learning rate jumps from {then:.2e} at step {saved.step} to {now:.2e} at step {saved.step + 1}: "
        f"train.steps, optimizer.lr or the schedule are not those of the checkpoint; set them as they were{smooth}"
    )


def _last_rate(saved: Progress, run: RunConfig) -> float | None:
    """Return the rate of a checkpoint's last step. Earlier versions saved the number of steps instead."""
    if saved.applied == 0 or saved.lr is not None:
        return saved.lr
    steps = saved.data.settings.get("train.steps")
    if steps is None:
        return None
    return learning_rate(saved.applied - 1, steps, run.optimizer, run.schedule)
