"""Stand-ins for the kernels of a GPU against these kernels, in Triton's interpreter: the same memory and results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.layers.kernels import LossCall, RotaryCall
from megatron_ds.planner.trace.kernels import num_pairs, stand_ins
from megatron_ds.planner.trace.recorder import Recorder
from tests.layers.kernel_errors import kernel
from tests.ranks import run_alone

Example = Callable[[], tuple[Any, ...]]
BF16 = torch.bfloat16


def rows(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=BF16)


def rotary() -> tuple[Any, ...]:
    kv = rows(8, 2, 2, 2, 32)
    return rows(8, 2, 4, 32), kv[..., 0, :], RotaryCall(rows(8, 1, 1, 32), rows(8, 1, 1, 32))


EXAMPLES: dict[str, Example] = {
    "rms_norm": lambda: (rows(3, 2, 64), rows(64), 1e-5),
    "add_rms_norm": lambda: (rows(3, 2, 64), rows(3, 2, 64), rows(64), 1e-5),
    "fp32_rms_norm": lambda: (rows(3, 2, 64), rows(64), 1e-5, 1.0),
    "swiglu": lambda: (rows(3, 2, 64),),
    "geglu": lambda: (rows(3, 2, 64), "tanh"),
    "rotary": rotary,
    "cross_entropy": lambda: (rows(4, 96), torch.zeros(4, dtype=torch.int64), LossCall(0, 90)),
}


def seen(compute: Callable[..., Any], example: Example, recorder: Recorder) -> list[Any]:
    """Return the memory that a kernel leaves for its backward pass, and the forms of results and gradients."""
    arguments = example()
    leaves = [one.requires_grad_() for one in arguments if isinstance(one, Tensor) and one.is_floating_point()]
    differentiable = not isinstance(arguments[-1], LossCall)
    with recorder, torch.set_grad_enabled(differentiable):
        overwrites = isinstance(arguments[-1], RotaryCall)
        result = compute(*(one.clone() if overwrites and isinstance(one, Tensor) else one for one in arguments))
        kept = recorder.live_bytes
    results = result if isinstance(result, tuple) else (result,)
    grads: tuple[Tensor, ...] = ()
    if differentiable:
        given = [torch.zeros_like(one) for one in results]
        with recorder:
            grads = torch.autograd.grad(results, leaves, given)
    return [kept, *((tuple(one.shape), one.dtype, one.stride()) for one in (*results, *grads))]


def both(operation: str) -> tuple[list[Any], list[Any]]:
    recorder = Recorder()
    stand_in = getattr(stand_ins("auto", recorder, 1), operation)
    return seen(stand_in, EXAMPLES[operation], recorder), seen(kernel(operation), EXAMPLES[operation], Recorder())


def test_pairs_of_attention() -> None:
    """Against masks, for queries that are the last ones of their keys."""
    for queries, keys, causal, window in [
        *((8, 8, True, None), (8, 8, False, None), (3, 8, True, None), (8, 8, True, 3), (3, 8, True, 6)),
        *((8, 8, True, 1), (8, 8, True, 20)),
    ]:
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen = torch.ones(queries, keys, dtype=torch.bool) if not causal else distance >= 0
        seen = seen if window is None else seen & (distance < window)
        assert num_pairs(queries, keys, causal, window, 1) == int(seen.sum()), (queries, keys, causal, window)
    assert num_pairs(8, 8, True, None, 2) == 2 * num_pairs(4, 4, True, None, 1)


@pytest.mark.parametrize("operation", EXAMPLES)
def test_a_stand_in_leaves_the_memory_of_its_kernel(operation: str) -> None:
    found, expected = run_alone(both, operation)
    assert found == expected
