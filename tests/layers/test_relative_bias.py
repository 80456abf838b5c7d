"""Relative position biases: transformers' buckets at every distance, and each head's own column of the table."""

from typing import Any

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from megatron_ds.layers.attention_masks import Span
from megatron_ds.layers.relative_bias import RelativeBias, RelativePositions, biases_of_pairs
from megatron_ds.parallel.grid import Grid, Layout
from megatron_ds.parallel.tensor import TensorParallel
from tests.ranks import run_alone, run_grid


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 12), (4, 3), (64, 1000), (6, 7)])
def test_buckets_are_those_of_transformers(buckets: int, farthest: int, causal: bool) -> None:
    length = 3 * farthest // 2 + 2
    ours = RelativePositions(buckets, farthest, std=1.0).buckets(length, causal)
    offsets = torch.arange(1 - length, length)
    theirs = T5Attention._relative_position_bucket(offsets, not causal, buckets, farthest)
    assert ours.tolist() == theirs.tolist()


def test_near_distances_have_a_bucket_each_and_far_ones_share() -> None:
    found = RelativePositions(32, 128, std=1.0).buckets(300, causal=True)[:300].flip(0)  # distances 0 to 299
    assert found[:16].tolist() == list(range(16))
    assert bool((found.diff() >= 0).all()) and int(found[127]) == int(found[299]) == 31
    both = RelativePositions(32, 128, std=1.0).buckets(300, causal=False)
    before, after = both[:299].flip(0), both[300:]
    assert (after - before).tolist() == [16] * 299


def _biases(grid: Grid, length: int, causal: bool) -> Any:
    bias = RelativeBias(RelativePositions(8, 12, std=1.0), 4, TensorParallel(grid.tensor), causal=causal)
    table = torch.arange(32.0).view(8, 4)
    local = 4 // grid.tensor.size
    bias.weight.data.copy_(table[:, grid.tensor.rank * local : (grid.tensor.rank + 1) * local])
    found = biases_of_pairs(bias(length), Span.of_row(length), torch.float32)
    found.sum().backward()
    return found.detach(), bias.weight.grad


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_a_rank_has_the_biases_of_its_heads(causal: bool) -> None:
    length = 20
    buckets = RelativePositions(8, 12, std=1.0).buckets(length, causal)
    table = torch.arange(32.0).view(8, 4)
    positions = torch.arange(length)
    expected = table[buckets[positions[None] - positions[:, None] + length - 1]].permute(2, 0, 1)[None]
    ((whole, gradient),) = run_grid(_biases, Layout(), length, causal)
    assert torch.equal(whole, expected)
    parts = run_grid(_biases, Layout(tensor=2), length, causal)
    assert torch.equal(torch.cat([found for found, _ in parts], dim=1), expected)
    assert torch.equal(torch.cat([grad for _, grad in parts], dim=1), gradient)
    assert float(gradient[:, 0].sum()) == length * length


def _gradients(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    bias = RelativeBias(RelativePositions(32, 128, std=1.0), 2, TensorParallel(), causal=False)
    bias.weight.data = torch.randn(32, 2).to(dtype)
    towards = torch.randn(1, 2, 512, 512) + 0.5  # sums that do not cancel
    pairs = biases_of_pairs(bias(512), Span.of_row(512), dtype)
    (pairs.float() * towards.to(dtype).float()).sum().backward()
    return bias.weight.grad.double()


def test_gradients_of_long_sequences_are_summed_in_fp32() -> None:
    """Of a distance there are as many pairs as positions: added up in bf16, their sum stops growing."""
    exact, rounded = (run_alone(_gradients, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert float((rounded - exact).norm() / exact.norm()) < 5e-3


def test_biases_of_a_span_are_those_of_its_pairs() -> None:
    by_distance = torch.arange(2.0 * 19).view(2, 19)
    whole = biases_of_pairs(by_distance, Span.of_row(10), torch.float32)
    for queries, keys in ((range(4, 6), range(6)), (range(3), range(10)), (range(7, 10), range(2, 5))):
        part = biases_of_pairs(by_distance, Span(queries, keys, 10), torch.float32)
        assert torch.equal(part, whole[:, :, queries.start : queries.stop, keys.start : keys.stop])
