"""`train.batch_ramp`: a global batch that grows in the first steps (Smith et al. 2018, Brown et al. 2020).

The size is that of Megatron-LM's `--rampup-batch-size`: it follows from the number of samples read before, and so from
the number of the step alone.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ds.config.schema_base import Count, Section
from megatron_ds.errors import ConfigError


class BatchRamp(Section):
    """A batch of `start` samples, which grows by `increment` at a time while the run reads the first `samples`."""

    start: Count
    increment: Count
    samples: Count


class BatchStage(NamedTuple):
    """Steps with batches of one size: the first of them, from 1, the samples read before it, and the size."""

    first_step: int
    samples_before: int
    size: int


@dataclass(frozen=True)
class BatchSizes:
    """The number of samples of every step of a run.

    Attributes:
        stages: in the order of the steps; the last one has no end.
    """

    stages: tuple[BatchStage, ...]

    @property
    def are_equal(self) -> bool:
        """True if all steps read as many samples."""
        return len(self.stages) == 1

    def at(self, step: int) -> int:
        """Return the number of samples of a step, counted from 1."""
        return self._stage_of(step).size

    def samples_before(self, step: int) -> int:
        """Return the number of samples of all steps before this one."""
        stage = self._stage_of(step)
        return stage.samples_before + (step - stage.first_step) * stage.size

    def steps_for(self, samples: int) -> int:
        """Return the least number of steps that read so many samples."""
        stage = next(one for one in reversed(self.stages) if one.samples_before < samples)
        return stage.first_step - 1 - (stage.samples_before - samples) // stage.size

    def _stage_of(self, step: int) -> BatchStage:
        assert step >= 1, f"step {step}"
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1]


def batch_sizes(size: int, ramp: BatchRamp | None) -> BatchSizes:
    """Return the batch sizes of a run.

    With k increments, the batch is `start + i * increment` from the first step on before which the run has read at
    least `samples * i / k`.

    Args:
        size: `train.global_batch_size`.
        ramp: a ramp that ends at it; None = all batches have it.
    """
    if ramp is None:
        return BatchSizes((BatchStage(1, 0, size),))
    increments = (size - ramp.start) // ramp.increment
    step, samples, stages = 1, 0, list[BatchStage]()
    while True:
        done = min(increments, samples * increments // ramp.samples)
        stages.append(BatchStage(step, samples, ramp.start + done * ramp.increment))
        if done == increments:
            return BatchSizes(tuple(stages))
        until = -(-(done + 1) * ramp.samples // increments)
        steps = -(-(until - samples) // stages[-1].size)
        step, samples = step + steps, samples + steps * stages[-1].size


def check_batch_ramp(size: int, ramp: BatchRamp) -> None:
    """Check that a ramp ends at `train.global_batch_size`.

    Raises:
        ConfigError: it does not.
    """
    if ramp.start >= size:
        raise ConfigError(
            f"train.batch_ramp.start={ramp.start} is not less than train.global_batch_size={size}, to which the batch "
            "grows; try a smaller one, or no train.batch_ramp"
        )
    rest = size - ramp.start
    if rest % ramp.increment:
        legal = [one for one in range(1, rest + 1) if rest % one == 0]
        near = [max(one for one in legal if one < ramp.increment), *(one for one in legal if one > ramp.increment)][:2]
        raise ConfigError(
            f"train.batch_ramp.increment={ramp.increment} does not divide train.global_batch_size - "
            f"train.batch_ramp.start = {rest}; nearest: {' or '.join(map(str, near))}"
        )
