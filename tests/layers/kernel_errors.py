"""Errors of a kernel against its formula in fp64, beside those of PyTorch's formula in the kernel's own dtype.

The kernels are Triton's, on a GPU where there is one, and else in Triton's interpreter on the CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ds.layers.kernels import KERNELS
from megatron_ds.layers.kernels.reference import Random, reference_rms_norm
from tests.layers.interpreter import round_to_nearest

Example = Callable[[Random], tuple[Any, ...]]

# Smallest relative error that is asked for: fp32 sums run in another order; half precision rounds once at least
FLOOR = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.4e-3}


def norm_in_fp64(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return reference_rms_norm(x, offset + weight, eps)


# Formulas for those references that compute in fp32 themselves
EXACT: dict[str, Callable[..., Any]] = {"fp32_rms_norm": norm_in_fp64}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernel(operation: str) -> Callable[..., Any]:
    round_to_nearest()
    return KERNELS[operation]["triton"].make()


def evaluate(function: Callable[..., Any], example: Example, dtype: torch.dtype, exact: bool = False) -> list[Tensor]:
    """Results, and gradients of all floating-point arguments, for random arguments that `dtype` can hold.

    Where `exact`, the same numbers are computed with in fp64.
    """
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator).to(device(), dtype)
        return drawn.double() if exact else drawn

    arguments = example(random)
    leaves = [one.requires_grad_() for one in arguments if isinstance(one, Tensor) and one.is_floating_point()]
    result = function(*arguments)
    results = result if isinstance(result, tuple) else (result,)
    wider = [random(*one.shape[:-1], one.shape[-1] + 3) for one in results]
    grads = torch.autograd.grad(results, leaves, [one[..., 1:-2] for one in wider])  # with gaps between rows
    return [one.detach() for one in (*results, *grads)]


def check(operation: str, example: Example, dtype: torch.dtype) -> None:
    """Assert that no result or gradient of the kernel has a larger error than PyTorch's, or than the floor.

    Errors are relative to the norm. Those of n elements differ by chance by a part of 1 / sqrt(n).
    """
    reference = KERNELS[operation].reference
    exact = evaluate(EXACT.get(operation, reference), example, dtype, exact=True)
    ours, theirs = (evaluate(one, example, dtype) for one in (kernel(operation), reference))
    for index, (found, other, expected) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert (found.dtype, found.shape) == (other.dtype, other.shape)
        error, allowed = (float((one.double() - expected).norm() / expected.norm()) for one in (found, other))
        allowed = max(allowed * (1 + 2 / expected.numel() ** 0.5), FLOOR[dtype])
        assert error <= allowed, (operation, dtype, index, error, allowed)
