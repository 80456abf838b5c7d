"""What both sides are run on: random ids, and ids that go past the model's windows and stretched positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ds.models.config import DecoderConfig

RANDOM_LENGTH = 64
BEYOND = 17  # tokens past a window: an odd number, so that nothing lines up by chance
MOST_TOKENS = 8192  # attention written out makes (heads, S, S) tensors
SEED = 20_240_607


@dataclass(frozen=True)
class Probe:
    """One input.

    Attributes:
        name: "random" or "past the window".
        input_ids: (B, S).
        with_gradients: whether a backward pass is made; the longer input goes without, for its memory.
    """

    name: str
    input_ids: Tensor
    with_gradients: bool


def probes(decoder: DecoderConfig, multiple_of: int) -> tuple[list[Probe], str | None]:
    """The inputs of a model, and what they do not reach, if anything.

    Args:
        decoder: the model.
        multiple_of: what every length must be divisible by: the tensor ranks under sequence parallelism.
    """
    longest = decoder.positions.max_positions if decoder.positions is not None else MOST_TOKENS
    length = _fitting(min(RANDOM_LENGTH, longest), multiple_of, longest)
    found = [Probe("random", _ids(decoder, 2, length), with_gradients=True)]
    edges = [edge for edge in _edges(decoder) if edge >= length]
    within = [edge for edge in edges if edge + BEYOND <= longest]
    if within:
        beyond = _fitting(max(within) + BEYOND, multiple_of, longest)
        found.append(Probe("past the window", _ids(decoder, 1, beyond), with_gradients=False))
    missed = sorted({edge for edge in edges if edge not in within})
    words = " and ".join(f"{edge:,}" for edge in missed)
    return found, f"windows or stretched positions of {words} tokens are longer than any input" if missed else None


def _edges(decoder: DecoderConfig) -> set[int]:
    """Lengths after which a model computes something else."""
    windows = {window for window in decoder.windows if window is not None}
    stretched = {
        rotary.original_max_positions
        for rotary in decoder.rotary
        if rotary is not None and rotary.scaling in ("dynamic", "longrope")
    }
    return windows | stretched


def _fitting(length: int, multiple_of: int, longest: int) -> int:
    """The nearest possible length: rounded up, or down where that is too long."""
    up = -(-length // multiple_of) * multiple_of
    return up if up <= longest else longest // multiple_of * multiple_of


def _ids(decoder: DecoderConfig, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + length)
    return torch.randint(0, decoder.vocab_size, (batch, length), generator=generator)
