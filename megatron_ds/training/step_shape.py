"""The samples that a step reads, as a function of its number: ramps have no state, so that a run resumes anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ds.config import BatchSizes


class StepSamples(NamedTuple):
    """The samples of one step.

    Attributes:
        position: where they begin in the stream of samples.
        size: their number.
    """

    position: int
    size: int


@dataclass(frozen=True)
class StepShapes:
    """The sizes of the steps of a run.

    Attributes:
        sizes: of their batches.
    """

    sizes: BatchSizes

    def remaining(self, done: int, position: int, steps: int) -> Iterator[StepSamples]:
        """Yield the samples of each step that is left.

        Args:
            done: number of steps done.
            position: where the next step begins in the stream of samples.
            steps: number of steps of the run.
        """
        for step in range(done + 1, steps + 1):
            size = self.sizes.at(step)
            yield StepSamples(position, size)
            position += size

    def describe_change(self, step: int) -> str | None:
        """Return a line about a step whose batch has another size than the one before; None = the same."""
        size = self.sizes.at(step)
        if step > 1 and size == self.sizes.at(step - 1):
            return None
        return f"step {step}: global batches of {size:,} samples" if not self.sizes.are_equal else None
