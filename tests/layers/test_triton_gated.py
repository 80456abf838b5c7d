"""SwiGLU and GeGLU in Triton: as exact as PyTorch's formula, for any width and stride, far out too."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.layers.kernels.reference import Random
from tests.layers.kernel_errors import check, device, kernel
from tests.ranks import run_alone

OPTIONS = {"swiglu": (), "geglu": ("none",), "geglu, tanh": ("tanh",)}


def whole(random: Random, *shape: int) -> Tensor:
    return random(*shape)


def a_part(random: Random, *shape: int) -> Tensor:
    return random(*shape[:-1], shape[-1] + 6)[..., 3:-3]


def _all(case: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for make, shape in ((whole, (5, 3, 14)), (whole, (2, 3000)), (a_part, (3, 2, 64)), (whole, (4, 2))):

            def example(random: Random, make: Any = make, shape: Any = shape) -> tuple[Any, ...]:
                return (2 * make(random, *shape), *OPTIONS[case])

            check(case.split(",")[0], example, dtype)


@pytest.mark.parametrize("case", OPTIONS)
def test_as_exact_as_the_formula(case: str) -> None:
    run_alone(_all, case)


def _far_out(case: str) -> list[Tensor]:
    gate = torch.tensor([-300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0])
    wide = torch.cat([gate, torch.ones(7)])[None].to(device()).requires_grad_()
    y = kernel(case.split(",")[0])(wide, *OPTIONS[case])
    return [y[0].detach().cpu(), torch.autograd.grad(y.sum(), wide)[0][0, :7].cpu()]


@pytest.mark.parametrize("case", OPTIONS)
def test_far_out_it_is_zero_or_the_gate(case: str) -> None:
    y, grad = run_alone(_far_out, case)
    torch.testing.assert_close(y, torch.tensor([0.0, 0, 0, 0, 20, 90, 300]), rtol=0, atol=1e-6)
    torch.testing.assert_close(grad, torch.tensor([0, 0, 0, 0.5, 1, 1, 1]), rtol=0, atol=1e-6)
