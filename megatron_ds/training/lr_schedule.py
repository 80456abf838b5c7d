"""The learning rate: a function of the number of optimizer steps applied so far.

A custom schedule is a function of a `SchedulePoint`, registered in `SCHEDULES`. It has no state: a resumed run calls
it for its current step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ds.checkpoint.progress import Progress
from megatron_ds.config import OptimizerSection, RunConfig, ScheduleSection
from megatron_ds.registry import Registry

LARGEST_CHANGE = 0.01
"""Relative difference of two learning rates up to which a schedule continues."""


@dataclass(frozen=True)
class SchedulePoint:
    """The arguments of a schedule: a step after the warm-up.

    Attributes:
        step: number of the step, from 1; skipped steps are not counted.
        steps: number of steps of the run.
        warmup_steps: steps of the linear warm-up, which ends at `peak_lr`.
        peak_lr: `optimizer.lr`.
        min_lr: `schedule.min_lr`.
    """

    step: int
    steps: int
    warmup_steps: int
    peak_lr: float
    min_lr: float

    @property
    def progress(self) -> float:
        """The completed fraction of the steps after the warm-up, with this step: 1 on the last one."""
        return min(1.0, (self.step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))

    def between(self, fraction: float) -> float:
        """Return the learning rate at a fraction of the way from `min_lr` up to `peak_lr`."""
        return self.min_lr + (self.peak_lr - self.min_lr) * fraction


Schedule = Callable[..., float]
"""(point, **schedule.options) -> learning rate; the same on every rank."""

SCHEDULES: Registry[Schedule] = Registry("schedule")


@SCHEDULES.register("constant")
def constant(point: SchedulePoint) -> float:
    """Keep the peak learning rate."""
    return point.peak_lr


@SCHEDULES.register("linear")
def linear(point: SchedulePoint) -> float:
    """Decay linearly to `min_lr`."""
    return point.between(1.0 - point.progress)


@SCHEDULES.register("cosine")
def cosine(point: SchedulePoint) -> float:
    """Decay to `min_lr` along half a cosine (Loshchilov and Hutter 2017)."""
    return point.between(0.5 * (1.0 + math.cos(math.pi * point.progress)))


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
