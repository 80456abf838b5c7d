"""Queries that see no key: a softmax over nothing is NaN in some kernels, and the layer never asks for one.

torch's math kernel with a mask of -inf is such a kernel: here it takes the place of the one that torch chooses.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.attention import Attention
from megatron_ds.layers.attention_masks import without_blind_rows
from megatron_ds.layers.attention_shape import AttentionShape
from megatron_ds.layers.recompute import Recompute
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.sharded import B, H, S
from tests.layers.test_attention import CONTEXT, PLAIN

LEFT_PADDED = torch.tensor([[False] * 3 + [True] * 5, [True] * 8])
NOTHING = torch.tensor([[False] * 8, [True] * 8])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])
BOTH_WAYS = replace(PLAIN, causal=False)
SHAPES = {
    "causal": (PLAIN, LEFT_PADDED, None),
    "window": (replace(PLAIN, window=2), torch.tensor([[True] * 3 + [False] * 5] * 2), None),
    "documents": (PLAIN, torch.tensor([[True] * 4 + [False] * 2 + [True] * 2] * 2), POSITIONS),
    "both ways": (BOTH_WAYS, NOTHING, None),
    "capped": (replace(PLAIN, softcap=0.7), LEFT_PADDED, None),
}


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *others: Any, scale: float, **options: Any) -> Tensor:
    """The formula with -inf where a bool mask is false: NaN in a row that is false throughout."""
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


def run(shape: AttentionShape, key_mask: Tensor, positions: Tensor | None, context: bool = False) -> list[Tensor]:
    """Output, and the gradients of the inputs and weights, for a gradient of every position."""
    torch.manual_seed(0)
    layer = Attention(shape, TensorParallel(), None, Recompute(), None)
    inputs = [torch.randn(S, B, H, requires_grad=True)]
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape) / 3)
    if context:
        inputs.append(torch.randn(CONTEXT, B, H, requires_grad=True))
    y = layer(inputs[0], key_mask, inputs[1] if context else None, positions)
    return [y, *torch.autograd.grad(y, [*inputs, *layer.parameters()], torch.randn(y.shape))]


@pytest.mark.parametrize("name", SHAPES)
def test_a_kernel_that_gives_nan_is_never_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, key_mask, positions = SHAPES[name]
    expected = run(shape, key_mask, positions)
    monkeypatch.setattr(F, "scaled_dot_product_attention", exact)
    found = run(shape, key_mask, positions)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all() and other.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_context_of_padding_alone_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", exact)
    key_mask = torch.ones(B, CONTEXT, dtype=torch.bool)
    key_mask[0] = False
    padded = run(BOTH_WAYS, key_mask, None, context=True)
    assert all(one.isfinite().all() for one in padded)
    seen = run(BOTH_WAYS, torch.ones_like(key_mask), None, context=True)
    assert torch.equal(padded[0][:, 1:], seen[0][:, 1:])
    assert torch.equal(padded[0][:, 0], torch.zeros(S, H)) and not padded[2][:, 0].any(), "no gradient of the context"


@pytest.mark.parametrize("name", ["causal", "window", "documents", "both ways"])
def test_results_are_those_of_a_softmax_over_nothing_in_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own CPU kernels give zero there, as transformers has it."""
    shape, key_mask, positions = SHAPES[name]
    found = run(shape, key_mask, positions)
    monkeypatch.setattr("megatron_ds.layers.attention.without_blind_rows", lambda mask: (mask, None))
    for one, other in zip(found, run(shape, key_mask, positions), strict=True):
        assert torch.equal(one, other)


def test_only_rows_that_see_no_key_change() -> None:
    mask = torch.tensor([[True, False], [False, False]])[:, None, None]
    changed, blind = without_blind_rows(mask)
    assert changed[:, 0, 0].tolist() == [[True, False], [True, True]]
    assert blind.flatten().tolist() == [False, True]
