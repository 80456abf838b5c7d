"""Attention with linear biases (Press et al. 2022): each head penalises distant keys by its own slope."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alibi:
    """A bias of slope * key position.

    It differs from -slope * distance by a constant per query, which the softmax cancels.

    Attributes:
        scale: factor of the bias, for models that scale it with the scores (Falcon).
        bf16: slopes and biases are rounded to bfloat16, as the model was trained with (Falcon).
    """

    scale: float = 1.0
    bf16: bool = False

    def bias(
        self,
        length: int,
        heads: range,
        num_heads: int,
        like: Tensor,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        """Return the biases of some heads, (B or 1, heads, 1, S), in the dtype and on the device of `like`.

        Args:
            length: S.
            heads: indices of the heads in the full model.
            num_heads: N.
            like: a tensor of the wanted dtype and device.
            key_mask: (B, S), nonzero where a position may be attended to; None = everywhere.
            positions: (B, S); None = they count the tokens in `key_mask`, so that padding on the left shifts nothing.
                The offset cancels in the softmax, but it changes how the biases are rounded.
            slopes: (heads,) on the device of `like`, as `HeadSlopes` keeps them; None = they are computed.
        """
        if slopes is None:
            slopes = alibi_slopes(num_heads)[heads.start : heads.stop].to(like.device)
        slopes = slopes[:, None]
        if positions is None and key_mask is not None:
            seen = key_mask.long()
            positions = (seen.cumsum(1) - 1) * seen
        elif positions is None:
            positions = torch.arange(length, device=like.device)[None]
        bias = (slopes.bfloat16() if self.bf16 else slopes) * positions[:, None, :]
        return (bias.to(like.dtype) * self.scale)[:, :, None, :]


class HeadSlopes:
    """The slopes of some heads, kept on the device that asks for them, because copying them there makes the host wait.

    They are no buffer of a module, which a run in bf16 would round.

    Args:
        heads: indices of the heads in the full model.
        num_heads: N.
    """

    def __init__(self, heads: range, num_heads: int) -> None:
        self.heads, self.num_heads = heads, num_heads
        self._kept: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """Return the slopes, (heads,) fp32. Code that torch.compile traces computes them, as a cache is two graphs."""
        if torch.compiler.is_compiling():
            return self._computed().to(device)
        if self._kept is None or self._kept.device != device:
            self._kept = self._computed().to(device)
        return self._kept

    def _computed(self) -> Tensor:
        return alibi_slopes(self.num_heads)[self.heads.start : self.heads.stop]


def alibi_slopes(num_heads: int) -> Tensor:
    """Return the slope of each head, (N,) fp32: a geometric series that starts at 2^(-8/N).

    If N is not a power of two, the series of the largest power of two below N is followed by every second slope of the
    next power's series, as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))

    def series(count: int, steps: Tensor) -> Tensor:
        return torch.tensor(2.0 ** (-8.0 / count)).pow(steps)

    slopes = series(power, torch.arange(1, power + 1, dtype=torch.int32))
    more = torch.arange(1, 2 * (num_heads - power) + 1, 2, dtype=torch.int32)
    return torch.cat([slopes, series(2 * power, more)])
