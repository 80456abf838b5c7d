"""Rotation of queries and keys in Triton, in place: as exact as PyTorch's formula, and right in any graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.layers.kernels import RotaryCall
from megatron_ds.layers.kernels.reference import Random, reference_rotary
from tests.layers.kernel_errors import check, device, kernel
from tests.ranks import run_alone

POSITIONS = [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]


def call(random: Random, dim: int, adjacent: bool, packed: bool) -> RotaryCall:
    """Angles of 5 positions."""
    angles = random(5, 1, 1, dim // 2)
    pairs = angles.repeat_interleave(2, dim=-1) if adjacent else torch.cat([angles, angles], dim=-1)
    positions = torch.tensor(POSITIONS, device=angles.device) if packed else None
    cos, sin = (table.bfloat16().type_as(pairs) for table in (pairs.cos(), pairs.sin()))  # the same in each dtype
    return RotaryCall(cos, sin, positions, adjacent)


# Heads of q and k, their dims, rotated dims; neighbours; packed; dtype
CASES = [
    (3, 1, 8, 8, False, False, torch.float32),
    (3, 1, 8, 8, True, True, torch.float32),
    (4, 2, 24, 12, False, True, torch.bfloat16),
    (4, 2, 24, 12, True, False, torch.bfloat16),
    (1, 1, 20, 4, False, True, torch.float16),
    (5, 5, 600, 600, False, False, torch.bfloat16),  # more heads than a program holds
]


def _all() -> None:
    for q_heads, k_heads, head, dim, adjacent, packed, dtype in CASES:

        def example(random: Random) -> tuple[Any, ...]:
            keys = random(5, 2, k_heads, 2, head).unbind(-2)[0]  # noqa: B023
            return random(5, 2, q_heads, head), keys, call(random, dim, adjacent, packed)  # noqa: B023

        check("rotary", example, dtype)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape).to(device())


def test_as_exact_as_the_formula() -> None:
    run_alone(_all)


class Projection(torch.autograd.Function):
    """A product that saves its inputs alone, as the layers' do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return tuple(x @ weight for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        of_x = sum(grad @ weight.t() for grad, weight in zip(grads, weights))
        return (of_x, *(x.flatten(0, 1).t() @ grad.flatten(0, 1) for grad in grads))  # type: ignore[return-value]


def as_they_are(x: Tensor, weight: Tensor) -> Tensor:
    return x


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return kernel("rms_norm")(x, weight, 1e-5)


def normalised_by_torch(x: Tensor, weight: Tensor) -> Tensor:
    return weight * torch.nn.functional.rms_norm(x, (8,), None, 1e-5)


def rescaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


def _graph(rotate: Callable[..., Any], prepare: Callable[..., Tensor], rescales_values: bool) -> list[Tensor | None]:
    """Output and gradients of projections, a norm, the rotation and attention."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 2, 6), (6, 4 * 8), (6, 2 * 2 * 8), (8,)]
    leaves = [torch.randn(*shape, generator=generator).to(device()).requires_grad_() for shape in shapes]
    x, q_weight, kv_weight, norm = leaves
    q, kv = Projection.apply(x, q_weight, kv_weight)
    q = q.unflatten(-1, (4, 8))
    k, v = kv.unflatten(-1, (2, 2, 8)).unbind(-2)
    if rescales_values:
        v = v * norm  # saves v, whose storage is that of k
    q, k = rotate(prepare(q, norm), prepare(k, norm), call(ones, 4, False, True))
    q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    y = y.sin() + (q.square().sum() + k.square().sum()) / 50
    grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    return [one.detach().cpu() if one is not None else None for one in (y, *grads)]


@pytest.mark.parametrize("rescales_values", [False, True])
@pytest.mark.parametrize("prepare", [as_they_are, normalised, normalised_by_torch, rescaled])
def test_in_a_graph(prepare: Callable[..., Tensor], rescales_values: bool) -> None:
    """The same output and gradients as out of place, where keys are a view between values, too."""
    ours, theirs = (
        run_alone(_graph, rotate, prepare, rescales_values)
        for rotate in (lambda *arguments: kernel("rotary")(*arguments), reference_rotary)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _saved_before() -> None:
    x = torch.randn(3, 1, 2, 8).to(device()).requires_grad_()
    q, k = x * 1.0, x * 2.0
    saved = q.square()
    q, k = kernel("rotary")(q, k, call(ones, 8, False, False))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (saved.sum() + q.sum() + k.sum()).backward()


def test_a_function_that_has_saved_what_is_rotated_fails() -> None:
    run_alone(_saved_before)


def _in_place() -> None:
    x = torch.randn(3, 1, 2, 8).to(device())
    q, k = x.clone(), torch.stack([x, x], dim=-2)[..., 0, :]
    rotated = kernel("rotary")(q, k, call(ones, 8, False, False))
    assert [one.data_ptr() for one in rotated] == [q.data_ptr(), k.data_ptr()]
    assert not torch.equal(q, x) and torch.equal(q, k)


def test_nothing_is_allocated_forward() -> None:
    run_alone(_in_place)


def _recomputed() -> list[list[Tensor]]:
    """With and without recomputation of projection and rotation."""
    found = []
    for recomputes in (False, True):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(5, 2, 6, generator=generator).to(device()).requires_grad_()
        weight = torch.randn(6, 64, generator=generator).to(device()).requires_grad_()

        def run(x: Tensor, weight: Tensor = weight) -> Tensor:
            q, k = Projection.apply(x, weight, weight)
            q, k = (one.unflatten(-1, (8, 8)) for one in (q, k))
            q, k = kernel("rotary")(q, k, call(ones, 8, True, False))
            return (q * k.sin()).sum()

        y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if recomputes else run(x)
        found.append([one.detach().cpu() for one in (y, *torch.autograd.grad(y, (x, weight)))])
    return found


def test_recomputation() -> None:
    plain, recomputed = run_alone(_recomputed)
    for one, other in zip(plain, recomputed):
        assert torch.equal(one, other)
