"""Recomputed blocks that keep the results of their attention kernel: the same bits, and the kernel runs once."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ds.layers.context.block_attention import FlashOnCPU
from megatron_ds.layers.context.blocks import Block
from megatron_ds.layers.recompute import ATTENTION_OPERATORS, BLOCKS, BLOCKS_WITHOUT_ATTENTION, Recompute
from tests.ranks import run_alone


class Counter(TorchDispatchMode):
    """The number of calls of attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.name() in ATTENTION_OPERATORS
        return func(*args, **(kwargs or {}))


def _block(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = (x @ weight).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + y.transpose(1, 2).flatten(2).tanh()


def _two_blocks(checkpoint: Any) -> tuple[list[Tensor], int, int]:
    torch.manual_seed(2)
    x, weight = torch.randn(2, 16, 8, requires_grad=True), torch.randn(8, 24, requires_grad=True)
    recompute = Recompute("full", checkpoint)
    with Counter() as forward:
        y = x
        for _ in range(2):
            y = recompute.run("full", _block, y, weight)
    with Counter() as backward:
        y.square().sum().backward()
    assert x.grad is not None and weight.grad is not None
    return [y.detach(), x.grad, weight.grad], forward.calls, backward.calls


@pytest.mark.parametrize(("checkpoint", "again"), [(BLOCKS, 2), (BLOCKS_WITHOUT_ATTENTION, 0)], ids=["all", "kept"])
def test_the_kernel_of_a_block(checkpoint: Any, again: int) -> None:
    found, forward, backward = run_alone(_two_blocks, checkpoint)
    expected, *_ = run_alone(_two_blocks, BLOCKS)
    assert (forward, backward) == (2, again)
    assert all(map(torch.equal, found, expected))


def _part_of_a_row(checkpoint: Any) -> list[Tensor]:
    """Attention to a part of a row of which the first query sees nothing, and its gradient."""
    torch.manual_seed(3)
    x, seen = torch.randn(1, 2, 4, 8, requires_grad=True), torch.tensor([[False, True, True, True]])
    hidden = torch.tensor([-torch.inf, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    block = Block(slice(0, 4), slice(0, 4), causal=True, key_term=hidden, seen=seen)

    def attend(given: Tensor) -> Tensor:
        out, lse = FlashOnCPU(0.3).forward(given, given, given, block)
        return out * lse.exp()[..., None]

    y = Recompute("full", checkpoint).run("full", attend, x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


def test_what_is_kept_of_a_part_of_a_row_stays_as_it_is() -> None:
    """Between context ranks queries that see no key of a part are left out of the kernel's log-sum-exp."""
    found, expected = (run_alone(_part_of_a_row, checkpoint) for checkpoint in (BLOCKS_WITHOUT_ATTENTION, BLOCKS))
    assert all(map(torch.equal, found, expected))


def test_operators_of_torch_are_there() -> None:
    """A name that torch changes would silently have the kernel run again."""
    for name in ATTENTION_OPERATORS:
        space, _, operator = name.partition("::")
        assert space != "aten" or hasattr(torch.ops.aten, operator), name
