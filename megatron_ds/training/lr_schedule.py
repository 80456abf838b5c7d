"""The learning rate, in one place: a function of how many optimizer steps were applied."""

from __future__ import annotations

import math

from megatron_ds.config import OptimizerSection, ScheduleSection


def learning_rate(applied: int, steps: int, optimizer: OptimizerSection, schedule: ScheduleSection) -> float:
    """The rate of the next step.

    Linear warm-up reaches `optimizer.lr` on step `warmup_steps` (the first step already learns), then constant, or a
    straight line or half a cosine (Loshchilov and Hutter 2017) down to `min_lr` on the last step.

    Args:
        applied: optimizer steps applied so far; one that DeepSpeed skipped for an fp16 overflow does not count, so the
            schedule does not advance on it.
        steps: of the whole run.
    """
    step = applied + 1
    peak, warmup = optimizer.lr, schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if schedule.name == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    remaining = 1.0 - progress if schedule.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.min_lr + (peak - schedule.min_lr) * remaining
