"""Rotary position embedding (Su et al. 2021) over all or some dims of a head, with the field's frequency scalings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ds.layers.kernels import Rotary, RotaryCall
from megatron_ds.parallel.context import ContextParallel

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

BY_LENGTH = frozenset({"dynamic", "longrope"})
"""Scalings whose frequencies depend on the length of the sequence."""


@dataclass(frozen=True)
class RotaryConfig:
    """Frequencies of a rotary embedding.

    Attributes:
        dim: the number of rotated dims per head, the first ones; the others are left unchanged.
        theta: base of the geometric series of wavelengths.
        scaling: "default"; "linear" (Chen et al. 2023); "dynamic" (NTK-aware, by length); "llama3" (Llama 3 herd of
            models, 2024); "yarn" (Peng et al. 2023); "longrope" (Ding et al. 2024).
        adjacent: pairs are (2i, 2i + 1) (GPT-J) instead of (i, i + dim/2).
        fp32: cos, sin and products are fp32, and the rotated heads are cast down (Ernie 4.5); else cos and sin have the
            dtype of the heads (Llama). `rounded`: cos and sin are rounded to that dtype all the same (Cohere).
        magnitude: cos and sin are multiplied by it (yarn, longrope).
        factor: how far positions are stretched.
        original_max_positions: the length before stretching; for "dynamic" the length from which bases grow.
        low_freq_factor, high_freq_factor: where llama3 blends stretched and plain waves.
        beta_fast, beta_slow, truncate: turns over the original length between which yarn blends, and whether the dims
            that they give are rounded outwards.
        short_factors, long_factors: divisors of the dim/2 frequencies up to the original length, and beyond it
            (longrope).
    """

    dim: int
    theta: float = 10000.0
    scaling: str = "default"
    adjacent: bool = False
    fp32: bool = False
    rounded: bool = False
    magnitude: float = 1.0
    factor: float = 1.0
    original_max_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert self.scaling in SCALINGS and self.dim % 2 == 0, self
        assert self.fp32 or not self.rounded, self
        assert self.scaling != "longrope" or len(self.short_factors) == len(self.long_factors) == self.dim // 2, self

    def inverse_frequencies(self, length: int) -> Tensor:
        """Return the angle per position of each pair, (dim/2,) fp32.

        Args:
            length: of the sequence; "dynamic" and "longrope" depend on it.
        """
        if self.scaling == "linear":
            return self._plain() / self.factor
        if self.scaling == "dynamic":
            stretch = self.factor * max(length, self.original_max_positions) / self.original_max_positions
            return self._plain(self.theta * (stretch - (self.factor - 1)) ** (self.dim / (self.dim - 2)))
        if self.scaling == "llama3":
            return self._llama3()
        if self.scaling == "yarn":
            return self._yarn()
        if self.scaling == "longrope":
            factors = self.long_factors if length > self.original_max_positions else self.short_factors
            exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * self.theta**exponents)
        return self._plain()

    def _plain(self, theta: float | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        return 1.0 / ((theta or self.theta) ** exponents)

    def _llama3(self) -> Tensor:
        plain = self._plain()
        wavelengths = 2 * math.pi / plain
        blend = (self.original_max_positions / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blended = (1 - blend) * plain / self.factor + blend * plain
        long = wavelengths > self.original_max_positions / self.low_freq_factor
        short = wavelengths < self.original_max_positions / self.high_freq_factor
        return torch.where(long, plain / self.factor, torch.where(short, plain, blended))

    def _yarn(self) -> Tensor:
        """Blend plain frequencies, for waves that turn often in the original length, with stretched ones for others."""
        low, high = (self._dim_of_turns(turns) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        span = high - low if high != low else 0.001
        stretched_part = ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        plain = self._plain()
        return plain / self.factor * stretched_part + plain * (1 - stretched_part)

    def _dim_of_turns(self, turns: float) -> float:
        """Return the (fractional) index of the pair of dims whose wave turns `turns` times in the original length."""
        wave = self.original_max_positions / (turns * 2 * math.pi)
        return self.dim * math.log(wave) / (2 * math.log(self.theta))


Angles = tuple[Tensor, Tensor]
"""cos and sin of positions, each (positions, 1, 1, dim), with a value per dim."""


class RotaryTable:
    """cos and sin of every position, cached per length, dtype and device, and shared by a stage's blocks.

    By default positions are 0..S-1 over the full sequence, which attention sees with and without sequence parallelism.
    Of context ranks each has a part of them.

    Args:
        config: the frequencies.
        context: the ranks that divide the sequence; None = one.
    """

    def __init__(self, config: RotaryConfig, context: ContextParallel | None = None) -> None:
        self.config, self.context = config, context or ContextParallel()
        self._tables: dict[tuple[int, torch.dtype, torch.device, bool], tuple[Tensor, Tensor]] = {}

    def rotate(
        self,
        q: Tensor,
        k: Tensor,
        positions: Tensor | None = None,
        angles: Angles | None = None,
        kernel: Rotary | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotate the pairs of queries and keys, (S, B, heads, D), by the angles of their positions.

        Args:
            q, k: they may be overwritten.
            positions: (B, S) of these tokens, below the length of the full sequence; None = those of this rank in it.
            angles: what `cos_sin` returns, from outside of a compiled graph; None = it is called here.
            kernel: the kernel, used unless a compiler fuses the formula or products are fp32; None = PyTorch's formula.
        """
        length = q.shape[0] * self.context.axis.size
        cos, sin = angles if angles is not None else self.cos_sin(length, like=q, every=positions is not None)
        adjacent = self.config.adjacent
        if kernel is not None and not self.config.fp32 and not torch.compiler.is_compiling():
            return kernel(q, k, RotaryCall(cos, sin, positions, adjacent))
        if positions is not None:
            cos, sin = (table[positions.t(), 0] for table in (cos, sin))
        return rotate(q, cos, sin, adjacent), rotate(k, cos, sin, adjacent)

    @torch.compiler.disable  # a miss and a hit of the cache would be two graphs: recomputation fails
    def cos_sin(self, length: int, like: Tensor, every: bool = True) -> Angles:
        """Return cos and sin, each (positions, 1, 1, dim), with a value per dim, in the dtype and device of `like`.

        They are fp32 if the config says so.

        Args:
            length: S, of the full sequence.
            like: a tensor of the wanted dtype and device.
            every: of all positions; else of those of this context rank, in their order.
        """
        dtype = torch.float32 if self.config.fp32 else like.dtype
        every = every or self.context.axis.size == 1
        key = (length, like.dtype, like.device, every)
        if key not in self._tables:
            speeds = self.config.inverse_frequencies(length)
            positions = torch.arange(length, dtype=torch.float32)
            if not every:
                positions = positions[self.context.positions(length, positions.device)]
            angles = torch.outer(positions, speeds)
            pairs = angles.repeat_interleave(2, dim=-1) if self.config.adjacent else torch.cat([angles, angles], dim=-1)
            pairs = pairs[:, None, None, :].to(like.device)
            first = like.dtype if self.config.rounded else dtype
            cos, sin = ((wave * self.config.magnitude).to(first).to(dtype) for wave in (pairs.cos(), pairs.sin()))
            self._tables = {key: (cos, sin)}
        return self._tables[key]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, adjacent: bool = False) -> Tensor:
    """Rotate the first `dim` of (S, B, heads, D), pairs being (i, i + dim/2), or neighbours where `adjacent`.

    The result has the dtype of x. Saves nothing of x for backward, and allocates one tensor forward and one backward.
    """
    if torch.compiler.is_compiling():
        return _rotated_by_parts(x, cos, sin, adjacent)
    return _Rotate.apply(x, cos, sin, adjacent)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, adjacent: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.adjacent = adjacent
        return _rotated(x, cos, sin, adjacent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Rotate back: the inverse of a rotation is its transpose."""
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin, ctx.adjacent), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, adjacent: bool) -> Tensor:
    dim = cos.shape[-1]
    out = x * cos if dim == x.shape[-1] else torch.cat([x[..., :dim] * cos, x[..., dim:]], dim=-1)
    firsts, seconds = (slice(0, dim, 2), slice(1, dim, 2)) if adjacent else (slice(0, dim // 2), slice(dim // 2, dim))
    sines = sin[..., firsts]
    out[..., firsts].addcmul_(x[..., seconds], sines, value=-1)
    out[..., seconds].addcmul_(x[..., firsts], sines)
    return out.to(x.dtype)


def _rotated_by_parts(x: Tensor, cos: Tensor, sin: Tensor, adjacent: bool) -> Tensor:
    """Rotate by operations that a compiler fuses and differentiates; it decides what is saved.

    torch.compile of torch 2.11 loses the gradient of `_Rotate`, whose result it has twice in its graph.
    """
    dim = cos.shape[-1]
    firsts, seconds = (slice(0, dim, 2), slice(1, dim, 2)) if adjacent else (slice(0, dim // 2), slice(dim // 2, dim))
    first, second, cosines, sines = x[..., firsts], x[..., seconds], cos[..., firsts], sin[..., firsts]
    parts = first * cosines - second * sines, second * cosines + first * sines
    turned = torch.stack(parts, dim=-1).flatten(-2) if adjacent else torch.cat(parts, dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., dim:]], dim=-1) if dim < x.shape[-1] else turned.to(x.dtype)
