"""torch's attention, which a plan may replace: on tensors without values torch does not choose as it does on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

ScaledDotProduct = Callable[..., Tensor]
"""A function with the arguments of `torch.nn.functional.scaled_dot_product_attention`."""


@dataclass
class _StandIn:
    """The function that attends instead of torch's, for all threads; torch.compile sees through its attribute."""

    attend: ScaledDotProduct | None = None


_STAND_IN = _StandIn()


def scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as torch's function does: (B, N, S, D), (B, K, C, D) twice -> (B, N, S, D)."""
    attend = _STAND_IN.attend or F.scaled_dot_product_attention
    return attend(q, k, v, mask, dropout, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)


@contextmanager
def replaced_by(stand_in: ScaledDotProduct) -> Iterator[None]:
    """Have another function attend within the block, on all threads of the process."""
    before, _STAND_IN.attend = _STAND_IN.attend, stand_in
    try:
        yield
    finally:
        _STAND_IN.attend = before
