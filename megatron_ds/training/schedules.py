"""Schedules of the learning rate after its warm-up: functions of a `SchedulePoint`, registered by name.

They have no state: a resumed run calls its schedule for the current step. Each reaches `min_lr` on the last step,
except `constant` and `inverse_sqrt`, which have no end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from megatron_ds.config.schema_base import Count
from megatron_ds.errors import ConfigError
from megatron_ds.registry import Registry

NO_WARMUP_TIMESCALE = 10_000
"""Steps of `inverse_sqrt` without warm-up, as in transformers."""


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
    def steps_after_warmup(self) -> int:
        """Number of steps of the run that follow the warm-up."""
        return self.steps - self.warmup_steps

    @property
    def progress(self) -> float:
        """The completed fraction of the steps after the warm-up, with this step: 1 on the last one."""
        return min(1.0, (self.step - self.warmup_steps) / max(1, self.steps_after_warmup))

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
    return point.between(_half_cosine(point.progress))


@SCHEDULES.register("polynomial")
def polynomial(point: SchedulePoint, *, power: Annotated[float, Field(gt=0)] = 1.0) -> float:
    """Decay to `min_lr` as a power of the fraction of the steps that is left, which is linear for 1."""
    return point.between((1.0 - point.progress) ** power)


@SCHEDULES.register("inverse_sqrt")
def inverse_sqrt(point: SchedulePoint, *, timescale: Count | None = None) -> float:
    """Decay with the inverse square root of the step, never below `min_lr` (Vaswani et al. 2017, Raffel et al. 2020).

    The rate is halved in the `3 * timescale` steps after the warm-up, and depends on no number of steps.

    Args:
        point: the step.
        timescale: steps; None = those of the warm-up, or `NO_WARMUP_TIMESCALE` without one.
    """
    scale = timescale or point.warmup_steps or NO_WARMUP_TIMESCALE
    return max(point.min_lr, point.peak_lr * math.sqrt(scale / (scale + point.step - point.warmup_steps)))


@SCHEDULES.register("cosine_with_restarts")
def cosine_with_restarts(
    point: SchedulePoint,
    *,
    cycles: Count = 2,
    length_factor: Annotated[float, Field(gt=0)] = 1.0,
    peak_factor: Annotated[float, Field(gt=0, le=1)] = 1.0,
) -> float:
    """Decay to `min_lr` along half a cosine several times, each time from the peak (Loshchilov and Hutter 2017).

    Args:
        point: the step.
        cycles: number of cosines; the last one ends with the run.
        length_factor: length of a cycle divided by that of the one before.
        peak_factor: peak of a cycle divided by that of the one before.
    """
    lengths = [length_factor**number for number in range(cycles)]
    position = point.progress * sum(lengths)
    number = 0
    # the tolerance, below any step, keeps the last step of a cycle in it
    while number < cycles - 1 and position > lengths[number] * (1 + 1e-9):
        position -= lengths[number]
        number += 1
    peak = max(point.min_lr, point.peak_lr * peak_factor**number)
    return point.min_lr + (peak - point.min_lr) * _half_cosine(min(1.0, position / lengths[number]))


@SCHEDULES.register("wsd")
def wsd(
    point: SchedulePoint,
    *,
    decay: Literal["linear", "1-sqrt", "cosine", "exponential"] = "linear",
    decay_share: Annotated[float, Field(gt=0, le=1)] | None = None,
    decay_steps: Count | None = None,
) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): keep the peak, then decay to `min_lr` in the last steps.

    A checkpoint from before the decay can be continued with more steps, as if the run had been longer from its start.

    Args:
        point: the step.
        decay: the form of the decay; `1-sqrt` as in Haegele et al. 2024, `exponential` as in Megatron-LM.
        decay_share: the fraction of the run's steps in which the rate decays; None = 0.1, without `decay_steps`.
        decay_steps: their number.

    Raises:
        ConfigError: the decay is longer than the steps after the warm-up, or its length is given twice.
    """
    if decay_share is not None and decay_steps is not None:
        raise ConfigError(
            f"schedule.options.decay_share={decay_share:g} and schedule.options.decay_steps={decay_steps} both set the "
            "length of the decay; keep one"
        )
    share = 0.1 if decay_share is None else decay_share
    length, most = decay_steps or max(1, round(share * point.steps)), point.steps_after_warmup
    if length > max(1, most):
        given = f"decay_steps={length}" if decay_steps is not None else f"decay_share={share:g}"
        near = f"decay_steps={most}" if most else "fewer schedule.warmup_steps"
        raise ConfigError(
            f"schedule.options.{given} is more than the {most} steps that follow the warm-up; nearest: {near}"
        )
    completed = min(1.0, max(0.0, (point.step - point.steps + length) / length))
    return point.between(_DECAYS[decay](completed))


def _half_cosine(fraction: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * fraction))


_DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda completed: 1.0 - completed,
    "1-sqrt": lambda completed: 1.0 - math.sqrt(completed),
    "cosine": _half_cosine,
    "exponential": lambda completed: 2.0 * 0.5**completed - 1.0,
}
"""Form of the decay -> completed fraction of it -> fraction of the way from `min_lr` to the peak, from 1 to 0."""
