"""torch's attention, which a plan may replace: on tensors without values torch does not choose as it does on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

ScaledDotProduct = Callable[..., Tensor]
"""A function with the arguments of `torch.nn.functional.scaled_dot_product_attention`."""

_stand_in: ScaledDotProduct | None = None  # of the process; torch.compile sees through a module's variable


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
    attend = _stand_in or F.scaled_dot_product_attention
    return attend(q, k, v, mask, dropout, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)


@contextmanager
def replaced_by(stand_in: ScaledDotProduct) -> Iterator[None]:
    """Have another function attend within the block, on all threads of the process."""
    global _stand_in
    before, _stand_in = _stand_in, stand_in
    try:
        yield
    finally:
        _stand_in = before
