"""FlexAttention computes what the formula says, forward and backward, from masks by blocks.

On a CPU it runs uncompiled, in fp32: the same functions of a pair of positions, the same blocks. Sums run in another
order: a relative 1e-5 of values around 1.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as library
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ds.layers.kernels import AttentionCall, flex
from megatron_ds.layers.kernels.block_mask import BLOCK
from megatron_ds.layers.kernels.flex import FlexAttention, KeptMasks, make_mask
from megatron_ds.layers.kernels.reference import reference_attention, reference_mask

CPU = torch.device("cpu")
LENGTH, BATCH, HEADS, GROUPS, DIM = 300, 2, 4, 2, 16  # three blocks, the last one not full
POSITIONS = torch.tensor([[*range(100), *range(156), *range(44)], [*range(1), *range(255), *range(40), *range(4)]])
PADDED = torch.ones(BATCH, LENGTH, dtype=torch.uint8)
PADDED[0, :140] = 0
PADDED[1, 280:] = 0
NOTHING = PADDED.clone()
NOTHING[0] = 0
BOTH_WAYS = {"causal": False}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


CALLS = {
    "causal": AttentionCall(0.3),
    "window": AttentionCall(0.3, window=70),
    "a window of blocks": AttentionCall(0.3, window=129),
    "documents": AttentionCall(0.3, positions=POSITIONS),
    "documents in a window": AttentionCall(0.3, window=90, positions=POSITIONS),
    "capped": AttentionCall(0.3, softcap=0.9, window=200),
    "biases by key": AttentionCall(0.3, key_bias=drawn(1, HEADS, LENGTH)),
    "biases by key of each row": AttentionCall(0.3, positions=POSITIONS, key_bias=drawn(BATCH, HEADS, LENGTH)),
    "learned biases": AttentionCall(0.3, distance_bias=drawn(HEADS, 2 * LENGTH - 1)),
    "padded": AttentionCall(0.3, key_mask=PADDED),
    "padded, in a window": AttentionCall(0.3, window=50, key_mask=PADDED, positions=POSITIONS),
    "sinks": AttentionCall(0.3, sinks=drawn(HEADS)),
    "sinks, padded": AttentionCall(0.3, window=50, key_mask=NOTHING, positions=POSITIONS, sinks=drawn(HEADS)),
    "both ways": AttentionCall(0.3, distance_bias=drawn(HEADS, 2 * LENGTH - 1), **BOTH_WAYS),
    "both ways, in a window": AttentionCall(0.3, window=70, **BOTH_WAYS),
    "both ways, in a window, padded": AttentionCall(0.3, window=200, key_mask=NOTHING, **BOTH_WAYS),
    "both ways, padded": AttentionCall(0.3, softcap=0.9, key_mask=NOTHING, **BOTH_WAYS),
}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(library, "_validate_device", lambda *tensors: None)  # refuses gradients on a CPU


def with_gradients(kernel: Any, call: AttentionCall) -> list[Tensor]:
    q, kv = drawn(LENGTH, BATCH, HEADS, DIM), drawn(LENGTH, BATCH, GROUPS, 2 * DIM)
    k, v = (part.contiguous() for part in kv.chunk(2, dim=-1))
    leaves = [q, k, v]
    if call.distance_bias is not None:
        leaves.append(call.distance_bias.clone())
        call = replace(call, distance_bias=leaves[-1])
    if call.sinks is not None:
        leaves.append(call.sinks.clone())
        call = replace(call, sinks=leaves[-1])
    for leaf in leaves:
        leaf.requires_grad_()
    y = kernel(q, k, v, call)
    return [y, *torch.autograd.grad(y, leaves, drawn(*y.shape))]


TRACED = (
    "learned biases",
    "sinks, padded",
    "both ways, in a window, padded",
    "both ways",
    "documents in a window",
    "padded, in a window",
    "capped",
)


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_formula(name: str, uncompiled: None) -> None:
    run: Any = flex.attend
    if name in TRACED:
        run = torch.compile(run, backend="aot_eager", dynamic=False, fullgraph=True)
    found = with_gradients(FlexAttention(run, KeptMasks()), CALLS[name])
    expected = with_gradients(reference_attention, CALLS[name])
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.isfinite().all()
        assert float((one - other).detach().norm()) <= 1e-5 * float(other.detach().norm())


def dense(number: Tensor, indices: Tensor) -> Tensor:
    """(B, n, n) bool of lists of blocks; a block is in a list once."""
    rows, count = number[:, 0], indices.shape[-1]
    found = torch.zeros(len(rows), count, count, dtype=torch.int64)
    listed = torch.arange(count) < rows[..., None]
    found.scatter_add_(2, indices[:, 0].long(), listed.long())
    assert int(found.max()) <= 1 and int(indices.min()) >= 0 and int(indices.max()) < count
    return found.bool()


def blocks_of(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, S) bool -> which blocks of pairs up to S are seen at all, and which in full, (B, n, n)."""
    length = pairs.shape[-1]
    count = -(-length // BLOCK)
    whole = torch.zeros(len(pairs), count * BLOCK, count * BLOCK, dtype=torch.bool)
    whole[:, :length, :length] = pairs
    inside = torch.zeros_like(whole)
    inside[:, :length, :length] = True

    def tiles(pairs: Tensor) -> Tensor:
        return pairs.unflatten(2, (count, BLOCK)).unflatten(1, (count, BLOCK))

    return tiles(whole).any(4).any(2), tiles(whole | ~inside).all(4).all(2) & tiles(inside).any(4).any(2)


def check_blocks(length: int, call: AttentionCall) -> None:
    blocks = make_mask(length, call, CPU).blocks
    assert blocks is not None and all(part.dtype == torch.int32 for part in blocks)
    seen, full = blocks_of(reference_mask(length, call, CPU)[:, 0])
    listed, listed_full = (dense(*blocks[at : at + 2]) for at in (0, 2))
    assert not (listed & listed_full).any()
    assert not (listed_full & ~full).any() and not (seen & ~(listed | listed_full)).any()
    if not call.causal:
        assert torch.equal(listed, seen) and not listed_full.any()
    elif call.key_mask is None:
        off_diagonal = ~torch.eye(full.shape[1], dtype=torch.bool)
        assert torch.equal(listed | listed_full, seen) and torch.equal(listed_full, full & off_diagonal)
    for at, one in ((4, listed), (6, listed_full)):
        assert torch.equal(dense(*blocks[at : at + 2]), one.transpose(1, 2))


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.causal])
def test_blocks_are_those_of_the_mask(name: str) -> None:
    check_blocks(LENGTH, CALLS[name])


@pytest.mark.parametrize("length", [128, 384, 513, 700])
def test_blocks_at_every_edge(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    for window in (None, 1, 2, 127, 128, 129, 256, 300):
        begins = torch.rand(3, length, generator=generator) < torch.tensor([[0.0], [0.01], [0.2]])
        begins[:, 0] = True
        begins[1, 128 % length] = True
        places = torch.arange(length)
        positions = places - torch.where(begins, places, 0).cummax(1).values
        check_blocks(length, AttentionCall(1.0, window=window, positions=positions))
        check_blocks(length, AttentionCall(1.0, window=window))
        if window is not None:
            check_blocks(length, AttentionCall(1.0, window=window, causal=False))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("name", ["documents in a window", "padded", "biases by key"])
def test_a_mask_grows_by_blocks(name: str) -> None:
    length = 32768
    positions = torch.arange(length).remainder(1000)[None]
    call = replace(
        CALLS[name],
        positions=positions if CALLS[name].positions is not None else None,
        key_mask=torch.ones(1, length, dtype=torch.uint8) if CALLS[name].key_mask is not None else None,
    )
    with Largest() as largest:
        make_mask(length, call, CPU)
    assert largest.elements <= (length // BLOCK) ** 2


def test_layers_share_a_mask() -> None:
    masks, positions = KeptMasks(), POSITIONS.clone()
    call = AttentionCall(0.3, window=90, positions=positions)
    first = masks.mask(LENGTH, call, CPU)
    assert masks.mask(LENGTH, replace(call, scale=1.0), CPU) is first
    assert masks.mask(LENGTH, replace(call, window=None), CPU) is not first
    assert masks.mask(LENGTH, replace(call, positions=positions.clone()), CPU) is not first
    assert masks.mask(LENGTH, call, CPU) is first
    plain = masks.mask(LENGTH, AttentionCall(0.3, softcap=1.0), CPU)
    assert masks.mask(LENGTH, AttentionCall(0.3), CPU) is plain is not first
