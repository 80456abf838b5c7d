"""Attention by kernels for documents of variable length, which see tokens and bounds instead of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.documents import cumulative_lengths
from megatron_ds.layers.kernels.reference import AttentionCall

Variable = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(tokens, N, D), (tokens, K, D) twice, cumulative lengths, the longest of them -> (tokens, N, D)."""


def by_documents(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, attend: Variable) -> Tensor:
    """Compute attention by a kernel for documents: (S, B, N, D), (S, B, K, D) twice -> (S, B, N, D).

    With one row nothing is copied.
    """
    length, batch = q.shape[:2]
    q, k, v = (part.transpose(0, 1).flatten(0, 1) for part in (q, k, v))
    y = attend(q, k, v, _bounds(call, batch, length, q.device), min(call.longest or length, length))
    return y.unflatten(0, (batch, length)).transpose(0, 1)


def _bounds(call: AttentionCall, batch: int, length: int, device: torch.device) -> Tensor:
    """Return the cumulative lengths of a call's documents; without bounds from the host, it waits for the device."""
    if call.bounds is not None or call.positions is None:
        return cumulative_lengths(batch, length, call.bounds, device)
    begins = (call.positions.flatten() == 0).nonzero().flatten().to(torch.int32)
    return F.pad(begins, (0, 1), value=batch * length)
