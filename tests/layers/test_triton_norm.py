"""RMSNorm in Triton: as exact as PyTorch's formula, for rows of any length and stride; sums that repeat."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.layers.kernels.reference import Random, reference_add_rms_norm, reference_rms_norm
from tests.layers.kernel_errors import check, device, evaluate, kernel
from tests.ranks import run_alone

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(random: Random, *shape: int) -> Tensor:
    return random(*shape)


def of_keys(random: Random, *shape: int) -> Tensor:
    """Keys between values: rows a constant stride apart."""
    return random(*shape[:-1], 2, shape[-1])[..., 0, :]


def turned(random: Random, *shape: int) -> Tensor:
    """Rows at two strides, which no view has as one."""
    return random(shape[1], shape[0], *shape[2:]).transpose(0, 1)


def columns_apart(random: Random, *shape: int) -> Tensor:
    return random(*shape, 2)[..., 0]


SHAPES = [
    (rows, (7, 19, 64)),  # several rows per program, and more than one round
    (rows, (1, 5)),
    (rows, (3, 33)),
    (rows, (2, 3, 100)),
    (rows, (5, 3000)),
    (of_keys, (9, 2, 5, 48)),
    (turned, (4, 3, 80)),
    (columns_apart, (4, 40)),
]


def _all(operation: str) -> None:
    """Every shape in every dtype; the weight is around 1, as a trained one is."""
    for dtype in DTYPES:
        for make, shape in SHAPES:
            check(operation, lambda random: ARGUMENTS[operation](random, make, shape), dtype)  # noqa: B023


ARGUMENTS: dict[str, Any] = {
    "rms_norm": lambda random, make, shape: (make(random, *shape), 1 + random(shape[-1]) / 4, 1e-5),
    "add_rms_norm": lambda random, make, shape: (
        make(random, *shape),
        rows(random, *shape),
        1 + random(shape[-1]) / 4,
        1e-5,
    ),
    "fp32_rms_norm": lambda random, make, shape: (make(random, *shape), random(shape[-1]) / 4, 1e-6, 1.0),
}


@pytest.mark.parametrize("operation", ARGUMENTS)
def test_as_exact_as_the_formula(operation: str) -> None:
    run_alone(_all, operation)


def _rounding() -> None:
    """Llama's order of rounding to the bit, but for statistics that differ in the last bit."""

    def example(random: Random) -> tuple[Any, ...]:
        return random(64, 96), random(96), 1e-5

    ours, theirs = (evaluate(one, example, torch.bfloat16)[0] for one in (kernel("rms_norm"), reference_rms_norm))
    assert (ours != theirs).float().mean() < 0.002
    late = evaluate(kernel("fp32_rms_norm"), lambda random: (*example(random), 0.0), torch.bfloat16)[0]
    assert (late != theirs).float().mean() > 0.05


def test_where_half_precision_is_cast_down() -> None:
    run_alone(_rounding)


def _mixed() -> None:
    """A weight in fp32 beside hidden states in bf16, as the formula promotes them; a frozen weight."""
    x = torch.randn(5, 40).to(device(), torch.bfloat16).requires_grad_()
    weight = torch.randn(40).to(device())
    for one in (kernel("rms_norm"), reference_rms_norm):
        y = one(x, weight, 1e-5)
        assert y.dtype == torch.float32
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.dtype == torch.bfloat16
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(kernel("rms_norm")(x, weight, 1e-5).sum(), weight)
    assert grad.dtype == torch.float32


def test_dtypes_and_frozen_weights() -> None:
    run_alone(_mixed)


def _one_of_two(index: int) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients where one of the two results is not used, by kernel and formula."""

    def found(function: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        leaves = [torch.randn(*shape, generator=generator).to(device()) for shape in ((6, 40), (6, 40), (40,))]
        for leaf in leaves:
            leaf.requires_grad_()
        result = function(*leaves, 1e-5)[index]
        grads = torch.autograd.grad(result, leaves, torch.ones_like(result), allow_unused=True)
        return [grad.cpu() for grad in grads if grad is not None]

    return found(kernel("add_rms_norm")), found(reference_add_rms_norm)


@pytest.mark.parametrize("index", [0, 1], ids=["norm", "sum"])
def test_a_result_that_is_not_used_has_no_gradient(index: int) -> None:
    ours, theirs = run_alone(_one_of_two, index)
    assert len(ours) == len(theirs) == 3 - index
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def _twice() -> bool:
    def example(random: Random) -> tuple[Any, ...]:
        return random(300, 64), random(64), 1e-5

    first, second = (evaluate(kernel("rms_norm"), example, torch.bfloat16) for _ in range(2))
    return all(torch.equal(one, other) for one, other in zip(first, second))


def test_sums_repeat_bit_for_bit() -> None:
    assert run_alone(_twice)


def _too_long() -> None:
    with pytest.raises(ConfigError, match="hidden size of 20000 is longer than a Triton norm's 16384; try torch"):
        kernel("rms_norm")(torch.zeros(1, 20000), torch.ones(20000), 1e-5)


def test_a_row_that_no_program_holds_is_refused() -> None:
    run_alone(_too_long)
