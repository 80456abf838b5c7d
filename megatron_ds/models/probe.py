"""Random inputs that exercise a model's options: some behind padding, some longer than windows, stretched positions or
distances that have a bias of their own. `ModelConfig.probes` makes them of the parts here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.columns import IGNORE_INDEX

RANDOM_LENGTH = 64
DECODER_LENGTH = 48  # of an encoder-decoder: another than the encoder's, so that they cannot stand in for each other
BEYOND = 17  # tokens past a window: an odd number, so that nothing lines up by chance
MOST_TOKENS = 8192  # attention written out makes (heads, S, S) tensors
ROWS = 3  # behind padding: the first row has no padding, the others differ
LABELLED = (0.5, 0.15, 0.3)  # labelled fraction of each row: uneven, so that a mean of means would show
SEED = 20_240_607


@dataclass(frozen=True)
class Probe:
    """One input and its labels.

    Attributes:
        name: "random", "past the window" and so on.
        columns: inputs of the model, by name, each (B, S); an encoder-decoder's decoder has (B, T).
        labels: label columns of its loss, by name, each (B, ...).
        with_gradients: whether a backward pass is made: once per model, as longer inputs take much memory.
    """

    name: str
    columns: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    with_gradients: bool

    @property
    def input_ids(self) -> Tensor:
        """(B, S)."""
        return self.columns["input_ids"]

    @property
    def batch(self) -> dict[str, Tensor]:
        """Columns and labels, as in a batch of a data set."""
        return {**self.columns, **self.labels}


def fitting_length(length: int, multiple_of: int, longest: int) -> int:
    """Return the nearest possible length: rounded up, or down where that is too long."""
    up = -(-length // multiple_of) * multiple_of
    return up if up <= longest else longest // multiple_of * multiple_of


def beyond_edges(edges: Collection[int], length: int, longest: int) -> tuple[int | None, str | None]:
    """Return the length of an input past the edges that one of `length` does not reach, and what none can reach.

    Args:
        edges: lengths beyond which a model computes something else, such as those of its windows.
        length: of another input.
        longest: that an input can have.

    Returns:
        the length, or None without such an edge; a description of the edges that are too far, or None.
    """
    wanted = [edge for edge in edges if edge >= length]
    within = [edge for edge in wanted if edge + BEYOND <= longest]
    missed = sorted(set(wanted) - set(within))
    lengths = " and ".join(f"{edge:,}" for edge in missed)
    left_out = f"windows or stretched positions of {lengths} tokens are longer than any input" if missed else None
    return max(within) + BEYOND if within else None, left_out


def seeded(seed: int) -> torch.Generator:
    """Return a random generator; each use has a `seed` of its own."""
    return torch.Generator().manual_seed(SEED + seed)


def random_ids(vocab_size: int, batch: int, length: int, seed: int = 0) -> Tensor:
    """Draw (B, S) int64 ids in [0, V)."""
    return torch.randint(0, vocab_size, (batch, length), generator=seeded(length + seed))


def right_padded(batch: int, length: int, most: int | None = None) -> Tensor:
    """(B, S) bool, true where a token is: the first row is full, each next one shorter by a quarter and a token, or by
    the `most` padding that a row may have."""
    most = length - 1 if most is None else min(most, length - 1)
    lengths = torch.tensor([length - min(most, row * (length // 4 + 1)) for row in range(batch)])
    return torch.arange(length) < lengths[:, None]


def next_ids(ids: Tensor) -> Tensor:
    """Return each position's next id as its label, (B, S) -> (B, S); the last position has no label."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE_INDEX)], dim=1)


def some_labels(ids: Tensor, seen: Tensor) -> Tensor:
    """Keep `ids` (B, S) as labels where a position is `seen` and chosen at random; the first one always has a label."""
    fractions = torch.tensor(LABELLED)[: len(ids), None]
    chosen = (torch.rand(ids.shape, generator=seeded(5)) < fractions) & seen
    chosen[:, 0] = True
    return ids.masked_fill(~chosen, IGNORE_INDEX)


def direction(*shape: int, seed: int = 3) -> Tensor:
    """Draw a direction in fp32, which takes the place of labels in a model that predicts nothing."""
    return torch.randn(*shape, generator=seeded(seed))
