"""Rotary position embedding (Su et al. 2021), half-split pairs, with the linear and Llama-3 frequency scalings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RotaryConfig:
    """Frequencies of a rotary embedding.

    Attributes:
        dim: rotated dims a head.
        theta: base of the geometric series of wavelengths.
        scaling: "default", "linear" (Chen et al. 2023) or "llama3" (Llama 3 herd of models, 2024).
        factor: how far positions are stretched (linear, llama3).
        low_freq_factor, high_freq_factor, original_max_positions: where llama3 blends stretched and plain waves.
    """

    dim: int
    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def inverse_frequencies(self) -> Tensor:
        """(dim/2,) fp32 angular speeds per position."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        plain = 1.0 / (self.theta**exponents)
        if self.scaling == "default":
            return plain
        if self.scaling == "linear":
            return plain / self.factor
        assert self.scaling == "llama3", self.scaling
        wavelengths = 2 * math.pi / plain
        blend = (self.original_max_positions / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - blend) * plain / self.factor + blend * plain
        long = wavelengths > self.original_max_positions / self.low_freq_factor
        short = wavelengths < self.original_max_positions / self.high_freq_factor
        return torch.where(long, plain / self.factor, torch.where(short, plain, blended))


class RotaryTable:
    """cos and sin of every position, made once per length, dtype and device and shared by a stage's blocks.

    Positions run 0..S-1 over the whole sequence: attention sees all of it, sequence parallelism or not.
    """

    def __init__(self, config: RotaryConfig) -> None:
        self.config = config
        self._tables: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def cos_sin(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors (S, 1, 1, dim), each half repeated, in `like`'s dtype and device."""
        key = (length, like.dtype, like.device)
        if key not in self._tables:
            angles = torch.outer(torch.arange(length, dtype=torch.float32), self.config.inverse_frequencies())
            angles = torch.cat([angles, angles], dim=-1)[:, None, None, :].to(like.device)
            self._tables = {key: (angles.cos().to(like.dtype), angles.sin().to(like.dtype))}
        return self._tables[key]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of (S, B, heads, D) by each position's angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
