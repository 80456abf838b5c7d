"""Operators that stand for a GPU's fused attention: a graph of torch.compile has them, and calls them as they are.

They have shapes alone: on torch's meta device they allocate what the kernels do, and compute nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = "megatron_ds_planner"
FORWARD, BACKWARD = f"{NAMESPACE}::attend", f"{NAMESPACE}::attend_backward"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LIBRARY.define("attend(Tensor q, Tensor k, Tensor v, int pairs) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int pairs)"
    " -> (Tensor, Tensor, Tensor)"
)


def _attend(q: Tensor, k: Tensor, v: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_LIBRARY.impl("attend", _attend, "Meta")
_LIBRARY.impl("attend_backward", _attend_backward, "Meta")

attend = torch.ops.megatron_ds_planner.attend.default
"""(queries (B, N, S, D), keys and values (B, K, C, D), pairs of a head of a row) -> output, log-sum-exp (B, N, S)."""
attend_backward = torch.ops.megatron_ds_planner.attend_backward.default
"""(gradient, queries, keys, values, output, log-sum-exp, pairs) -> gradients of queries, keys and values."""
