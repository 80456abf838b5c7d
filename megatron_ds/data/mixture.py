"""Weights of the sources of a blend that change during a run.

A mixture is a succession of phases. In each, samples are taken in proportion to its weights, as in a blend of its own,
and every source continues with the sample that follows the last one that was taken from it. So a change of weights
neither repeats nor skips a document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_ds.config import MixtureStart, parse_start
from megatron_ds.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """A part of a run with constant weights.

    Attributes:
        first: index of its first sample in the run.
        weights: of the sources, not negative, at least one more than 0; their sum does not matter.
    """

    first: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """The phases of a run, in order; the first one begins at sample 0."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        firsts = [phase.first for phase in self.phases]
        assert firsts[0] == 0 and firsts == sorted(set(firsts)), firsts

    @classmethod
    def of(cls, weights: Weights) -> Mixture:
        """Return a mixture as it is, and that of one phase with constant weights."""
        return weights if isinstance(weights, cls) else cls((Phase(0, tuple(weights)),))  # type: ignore[arg-type]

    def lengths(self, num_samples: int) -> list[int]:
        """Return how many of the first `num_samples` samples of a run are in each phase."""
        ends = [*(phase.first for phase in self.phases[1:]), num_samples]
        return [max(0, min(end, num_samples) - phase.first) for phase, end in zip(self.phases, ends)]

    def begun(self, num_samples: int) -> tuple[Phase, ...]:
        """Return the phases of which a run that has taken `num_samples` samples has taken some, or the first."""
        return tuple(phase for phase in self.phases if phase.first < max(num_samples, 1))


Weights = Sequence[float] | Mixture
"""Weights of the sources of a blend: constant ones, or those of phases."""


def plan_mixture(
    weights: Sequence[float | Mapping[int | str, float]], samples_before: Callable[[int], int], seq_length: int
) -> Mixture:
    """Return the mixture of a run from the weights that its run file gives the sources.

    Args:
        weights: of each source: a number, or its weights from certain steps or numbers of tokens on.
        samples_before: number of steps -> number of samples of all these steps.
        seq_length: tokens of a sample.

    Raises:
        ConfigError: all weights are 0 from some step on, or a source has two weights from one sample on.
    """

    def sample_of(start: MixtureStart) -> int:
        return samples_before(start.step) if start.step is not None else math.ceil(start.tokens / seq_length)

    def by_sample(given: Mapping[int | str, float]) -> dict[int, float]:
        found: dict[int, float] = {}
        for key, value in given.items():
            sample = sample_of(parse_start(key))
            if found.setdefault(sample, value) != value:
                raise ConfigError(
                    f"data.train: weight has two values, {found[sample]:g} and {value:g}, from sample {sample:,} on: "
                    "the steps and the tokens among its keys meet there; remove one"
                )
        return found

    of_sources = [by_sample(one) if isinstance(one, Mapping) else {0: float(one)} for one in weights]
    phases: list[Phase] = []
    for first in sorted({first for one in of_sources for first in one}):
        now = tuple(one[max(start for start in one if start <= first)] for one in of_sources)
        if not any(now):
            raise ConfigError(f"data.train: all weights are 0 from sample {first:,} on; give one source a weight there")
        if not phases or phases[-1].weights != now:
            phases.append(Phase(first, now))
    return Mixture(tuple(phases))
