"""Block inputs in host memory: the same bits, the order of the copies, and what is left on the device.

`LateCopies` stands in for a stream: what it fetches is NaN until it is waited for.
"""

import gc
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.layers.host_offload import HostOffload, copies_of
from megatron_ds.layers.recompute import Recompute
from tests.ranks import run_alone

CPU = torch.device("cpu")
NUM_BLOCKS, SHAPE = 4, (5, 2, 8)


@dataclass
class LateCopies:
    """Copies in the order of their calls, each identified by the mean of its tensor."""

    log: list[str] = field(default_factory=list)

    def to_host(self, x: Tensor) -> Tensor:
        self.log.append(f"keep {_name(x)}")
        return x.detach().clone()

    def begin_fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        self.log.append(f"fetch {_name(host)}")
        fetched = torch.full_like(host, torch.nan)
        return fetched, (fetched, host)

    def wait(self, event: Any) -> None:
        fetched, host = event
        self.log.append(f"wait {_name(host)}")
        fetched.copy_(host)


def _name(x: Tensor) -> int:
    """The number of the block whose input this is: its last feature, which blocks count up."""
    return round(float(x[0, 0, -1]))


def _block(log: list[str], weight: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """A block that counts in the last feature and treats the others alone."""
    log.append(f"run {_name(x)}")
    changed = (x[..., :-1] @ weight).tanh() * mask
    return torch.cat([x[..., :-1] + changed, x[..., -1:] + 1], dim=-1)


def _inputs(requires_grad: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(1)
    weights = [torch.randn(7, 7, requires_grad=True) for _ in range(NUM_BLOCKS)]
    x = torch.randn(SHAPE)
    x[..., -1] = 0
    return weights, x.requires_grad_(requires_grad), torch.rand(SHAPE[0], SHAPE[1], 1)


def _forward(recompute: Recompute, log: list[str], weights: list[Tensor], x: Tensor, mask: Tensor) -> Tensor:
    for weight in weights:
        x = recompute.run("full", partial(_block, log, weight), x, mask)
    return x


def _gradients(offload: HostOffload | None, log: list[str], requires_grad: bool = True) -> list[Tensor]:
    weights, x, mask = _inputs(requires_grad)
    y = _forward(Recompute("full", offload=offload), log, weights, x, mask)
    y[..., :-1].square().sum().backward()
    return [y.detach(), *(one.grad for one in (x, *weights) if one.grad is not None)]


def _exact(requires_grad: bool) -> tuple[int, list[bool], list[str]]:
    copies = LateCopies()
    expected = _gradients(None, [], requires_grad)
    found = _gradients(HostOffload(copies), copies.log, requires_grad)
    on_cpu = _gradients(HostOffload(copies_of(CPU)), [], requires_grad)
    same = [torch.equal(one, other) for one, other in zip(expected * 2, found + on_cpu, strict=True)]
    return len(expected), same, copies.log


@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_same_bits_and_fetched_one_block_ahead(requires_grad: bool) -> None:
    count, same, log = run_alone(_exact, requires_grad)
    assert count == 1 + requires_grad + NUM_BLOCKS
    assert all(same) and len(same) == 2 * count
    forward = [f"{what} {block}" for block in range(NUM_BLOCKS) for what in ("keep", "run")]
    backward = ["fetch 2", "run 3", "wait 2", "fetch 1", "run 2", "wait 1", "fetch 0", "run 1", "wait 0", "run 0"]
    assert log == forward + backward


def _two_micro_batches() -> tuple[list[bool], list[str]]:
    """Forward twice, then backward in both orders: as stages of a pipeline have several micro-batches on their way."""
    same, logs = [], []
    for order in ((0, 1), (1, 0)):
        copies = LateCopies()
        weights, x, mask = _inputs()
        found = []
        for offload in (None, HostOffload(copies)):
            recompute = Recompute("full", offload=offload)
            outputs = [_forward(recompute, [], weights, x * scale, mask)[..., :-1].square().sum() for scale in (1, 2)]
            for one in order:
                outputs[one].backward()
            found.append([one.grad for one in (x, *weights)])
            for one in (x, *weights):
                one.grad = None
        same += [torch.equal(one, other) for one, other in zip(*found, strict=True)]
        logs.append(" ".join(line for line in copies.log if line.startswith("fetch")))
    return same, logs


def test_micro_batches_on_their_way() -> None:
    """The older one's last block left the device; nothing is fetched twice, or before its micro-batch's turn."""
    same, (older_first, newer_first) = run_alone(_two_micro_batches)
    assert all(same)
    assert older_first == "fetch 3 fetch 2 fetch 1 fetch 0 fetch 2 fetch 1 fetch 0"
    assert newer_first == "fetch 2 fetch 1 fetch 0 fetch 3 fetch 2 fetch 1 fetch 0"


def _alive() -> list[int]:
    """The number of block inputs on the device, after each block of the forward pass."""
    weights, x, mask = _inputs()
    recompute, inputs, counts = Recompute("full", offload=HostOffload(copies_of(CPU))), [], []
    for weight in weights:
        inputs.append(weakref.ref(x.untyped_storage()))
        x = recompute.run("full", partial(_block, [], weight), x, mask)
        gc.collect()
        counts.append(sum(one() is not None for one in inputs[1:]))  # the first is the caller's
    return counts


def test_the_memory_of_an_input_is_free_after_the_next_block_began() -> None:
    assert run_alone(_alive) == [0, 1, 1, 1]
