"""Attention with linear biases (Press et al. 2022): each head prefers near keys, by a slope of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alibi:
    """A bias of slope * key position, which differs from -slope * distance by what the softmax takes out.

    Attributes:
        scale: multiplies the bias, where a model scales it together with the scores (Falcon).
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
    ) -> Tensor:
        """(B or 1, heads, 1, S) in `like`'s dtype and device, for some of the model's heads.

        Positions (B, S), where they are not given, count the tokens that `key_mask` (B, S) shows: padding on the left
        moves none. Which matters to how the biases are rounded.
        """
        slopes = alibi_slopes(num_heads)[heads.start : heads.stop, None].to(like.device)
        if positions is None and key_mask is not None:
            seen = key_mask.long()
            positions = (seen.cumsum(1) - 1) * seen
        elif positions is None:
            positions = torch.arange(length, device=like.device)[None]
        bias = (slopes.bfloat16() if self.bf16 else slopes) * positions[:, None, :]
        return (bias.to(like.dtype) * self.scale)[:, :, None, :]


def alibi_slopes(num_heads: int) -> Tensor:
    """(N,) fp32: a geometric series from 2^(-8/N); for other N than powers of two, filled up with every second slope of
    the next power's series, as the paper's authors do."""
    power = 2 ** math.floor(math.log2(num_heads))

    def series(count: int, steps: Tensor) -> Tensor:
        return torch.tensor(2.0 ** (-8.0 / count)).pow(steps)

    slopes = series(power, torch.arange(1, power + 1, dtype=torch.int32))
    more = torch.arange(1, 2 * (num_heads - power) + 1, 2, dtype=torch.int32)
    return torch.cat([slopes, series(2 * power, more)])
