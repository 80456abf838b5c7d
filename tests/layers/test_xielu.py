"""xIELU equals its formula at any layout, with whole gradients of its scalars, and transformers' to the bit in bf16."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.mlp import MLPShape
from megatron_ds.layers.xielu import BETA, EPS, XIELU
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.sharded import FEATURES, LAYOUTS, Case, check
from tests.ranks import run_alone


def xielu(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    above, below = F.softplus(parameters["alpha_p"]), BETA + F.softplus(parameters["alpha_n"])
    return torch.where(x > 0, above * x.square(), below * (torch.expm1(x.clamp(max=EPS)) - x)) + BETA * x


CASES = {"xielu": Case(XIELU, xielu, {"alpha_p": (1,), "alpha_n": (1,)}, x=FEATURES, y=FEATURES)}


@pytest.mark.parametrize(("tp", "sequence"), LAYOUTS)
def test_equals_the_formula(tp: int, sequence: bool) -> None:
    check(CASES, tp, sequence)


def _beside_transformers() -> list[bool]:
    from transformers.activations import XIELUActivation

    torch.manual_seed(1)
    ours, theirs = XIELU(TensorParallel()).bfloat16(), XIELUActivation(dtype=torch.bfloat16)
    with torch.no_grad():
        for one, other in ((ours.alpha_p, theirs.alpha_p), (ours.alpha_n, theirs.alpha_n)):
            one.copy_(torch.randn(1))
            other.copy_(one)
    x = (3 * torch.randn(4, 5, 64)).bfloat16()
    grad = torch.randn(4, 5, 64).bfloat16()
    found = []
    for act in (ours, theirs):
        given = x.clone().requires_grad_()
        y = act(given)
        y.backward(grad)
        found.append([y, given.grad, act.alpha_p.grad, act.alpha_n.grad])
    return [torch.equal(one, other) for one, other in zip(*found)]


def test_is_transformers_in_half_precision() -> None:
    assert run_alone(_beside_transformers) == [True] * 4


def _starts() -> tuple[list[float], dict[str, list[int]]]:
    act = XIELU(TensorParallel())
    return [act.alpha_p.spec.fill, act.alpha_n.spec.fill], {n: list(t.shape) for n, t in act.untrained().items()}  # type: ignore[attr-defined]


def test_begins_with_both_slopes_of_0_8() -> None:
    fills, constants = run_alone(_starts)
    above, below = F.softplus(torch.tensor(fills)).tolist()
    assert above == pytest.approx(0.8) and BETA + below == pytest.approx(0.8)
    assert constants == {"beta": [1], "eps": [1]}


def test_no_gate_has_scalars_of_its_own() -> None:
    with pytest.raises(AssertionError):
        MLPShape(8, 8, "xielu", gated=True, bias=False, dropout=0.0, std=1.0, out_std=1.0)
