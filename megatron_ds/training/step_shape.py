"""The samples that a step reads, as a function of its number: ramps have no state, so that a run resumes anywhere."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_ds.config import BatchSizes, LengthStage, RunConfig, length_stages


class StepSamples(NamedTuple):
    """The samples of one step.

    Attributes:
        position: where they begin in the stream of samples.
        size: their number.
        length: tokens of the rows that they are cut into.
    """

    position: int
    size: int
    length: int


@dataclass(frozen=True)
class StepShapes:
    """The sizes of the steps of a run.

    Attributes:
        sizes: of their batches.
        lengths: of the rows that samples are cut into.
    """

    sizes: BatchSizes
    lengths: tuple[LengthStage, ...]

    @classmethod
    def of_run(cls, run: RunConfig) -> StepShapes:
        """Return the shapes of the steps of a run file."""
        return cls(run.train.batch_sizes, length_stages(run.data.seq_length, run.train.length_ramp))

    def length_at(self, step: int) -> int:
        """Return the length of the rows of a step, counted from 1."""
        return self.lengths[bisect_right(self.lengths, step, key=lambda stage: stage.first_step) - 1].length

    def remaining(self, done: int, position: int, steps: int) -> Iterator[StepSamples]:
        """Yield the samples of each step that is left.

        Args:
            done: number of steps done.
            position: where the next step begins in the stream of samples.
            steps: number of steps of the run.
        """
        for step in range(done + 1, steps + 1):
            size = self.sizes.at(step)
            yield StepSamples(position, size, self.length_at(step))
            position += size

    def logged(self, step: int) -> dict[str, int]:
        """Return what metrics say about the shape of a step: of what a ramp changes, the present size."""
        size = {} if self.sizes.are_equal else {"samples": self.sizes.at(step)}
        return size | ({} if len(self.lengths) == 1 else {"seq_length": self.length_at(step)})

    def describe_change(self, step: int) -> str | None:
        """Return a line about a step whose shape is another than that of the step before; None = it is the same."""
        before, now = self.logged(step - 1) if step > 1 else {}, self.logged(step)
        texts = {"samples": "global batches of {:,} samples", "seq_length": "rows of {:,} tokens"}
        changed = [texts[name].format(value) for name, value in now.items() if before.get(name) != value]
        return f"step {step}: {', '.join(changed)}" if changed else None
