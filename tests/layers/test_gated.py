"""A gated activation and its gradient, written in place of one another, equal what autograd makes of the formula."""

import pytest
import torch

from megatron_ds.layers.mlp import ACTIVATIONS, gated_product
from tests.ranks import run_alone


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    wide = torch.randn(5, 3, 14).to(dtype).requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    expected = ACTIVATIONS[activation](gate) * up
    found = gated_product(wide, activation)
    assert torch.equal(found, expected)
    grad = torch.randn(5, 3, 7).to(dtype)
    ours, theirs = (torch.autograd.grad(y, wide, grad)[0] for y in (found, expected))
    assert torch.equal(ours, theirs)


def _graph_breaks(activation: str) -> int:
    compiled = torch._dynamo.explain(lambda wide: gated_product(wide, activation))
    return compiled(torch.randn(5, 3, 14, requires_grad=True)).graph_break_count


def test_a_compiler_sees_one_graph() -> None:
    assert run_alone(_graph_breaks, "silu") == 0
