"""What every dataset gives and every consumer takes: one training sample, and the protocol of a dataset of them.

Shape suffixes: `S` = `seq_length`, the same for every sample of a dataset.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

IGNORE_INDEX = -100
"""A target with this value carries no loss (transformers' and torch's convention)."""


@dataclass(frozen=True)
class Sample:
    """One sample of a causal model: the target of position t is what should follow position t.

    Attributes:
        input_ids: (S,) int64.
        targets: (S,) int64, already shifted: a model never shifts them again. IGNORE_INDEX carries no loss.
        attention_mask: (S,) bool, True where a position may be attended to; None where the dataset has no such column.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    attention_mask: np.ndarray | None = None


class Dataset(Protocol):
    """A finite, ordered, randomly addressable set of samples of one length."""

    @property
    def seq_length(self) -> int:
        """S, the number of positions of every sample."""

    @property
    def has_attention_mask(self) -> bool:
        """Whether the samples carry an `attention_mask`: all of them, or none."""

    @property
    def fingerprint(self) -> str:
        """Hash of the samples' content and length: equal on every machine, and changed by any change of a sample."""

    def __len__(self) -> int:
        """The number of samples, at least 1."""

    def sample(self, index: int) -> Sample:
        """Sample `index`, 0 <= index < len(self)."""

    def describe(self) -> str:
        """One line for people, such as `3.1 M tokens, 5,987 samples of 512`."""
