"""Tiles of queries, where torch would compute pairs that a mask leaves out: the same results from fewer pairs."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.alibi import Alibi
from megatron_ds.layers.attention import Attention
from megatron_ds.layers.attention_masks import Row, Span, allowed_keys, allowed_keys_on_both_sides
from megatron_ds.layers.recompute import Recompute
from megatron_ds.layers.scaled_dot_product import replaced_by
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.sharded import B, S, check
from tests.layers.test_attention import BOTH_WAYS, CASES, DIM, HEADS, KEY_MASK, PLAIN, POSITIONS
from tests.layers.tiles import set_queries_of_a_tile
from tests.ranks import run_alone

BIASES = torch.randn(HEADS, 2 * S - 1, generator=torch.Generator().manual_seed(1))
SHAPES = {
    "plain": (PLAIN, Row()),
    "a window as long as the row": (replace(PLAIN, window=S), Row()),
    "window": (replace(PLAIN, window=3), Row()),
    "documents": (PLAIN, Row(positions=POSITIONS)),
    "padded": (PLAIN, Row(KEY_MASK)),
    "fixed biases": (replace(PLAIN, alibi=Alibi(8.0)), Row()),
    "learned biases": (PLAIN, Row(distances=BIASES)),
    "fixed biases, padded": (replace(PLAIN, alibi=Alibi(8.0)), Row(KEY_MASK)),
    "both ways": (BOTH_WAYS, Row(KEY_MASK)),
    "both ways, in a window": (replace(BOTH_WAYS, window=3), Row()),
}
PAIRS = {
    **dict.fromkeys(("plain", "a window as long as the row", "fixed biases, padded", "both ways"), S * S),
    **dict.fromkeys(("documents", "padded", "fixed biases", "learned biases"), 3 * 3 + 3 * 6 + 2 * 8),
    "window": 3 * 3 + 3 * 5 + 2 * 4,
    "both ways, in a window": 3 * 5 + 3 * 7 + 2 * 4,
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    set_queries_of_a_tile(monkeypatch, 3)


@pytest.mark.usefixtures("small_tiles")
def test_tiles_equal_the_formula() -> None:
    check(CASES, 1, False)


def computed(name: str, compiled: bool = False) -> tuple[list[Tensor], int]:
    """Output and gradients of an attention core, and the pairs of a head of a row that torch is asked for."""
    shape, row = SHAPES[name]
    generator, pairs = torch.Generator().manual_seed(2), []
    q, k, v = (torch.randn(S, B, HEADS, DIM, generator=generator, requires_grad=True) for _ in range(3))
    layer = Attention(replace(shape, num_kv_heads=HEADS), TensorParallel(), None, Recompute(), None)

    def attend(q: Tensor, k: Tensor, *others: Any, **options: Any) -> Tensor:
        pairs.append(q.shape[2] * k.shape[2])
        return F.scaled_dot_product_attention(q, k, *others, **options)

    by_torch = torch.compile(layer._by_torch, fullgraph=True, backend="aot_eager") if compiled else layer._by_torch
    with nullcontext() if compiled else replaced_by(attend):
        y = by_torch(q, k, v, row)
    return [y, *torch.autograd.grad(y, (q, k, v), torch.randn(y.shape, generator=generator))], sum(pairs)


@pytest.mark.parametrize("name", SHAPES)
def test_tiles_equal_the_whole_row(name: str, request: pytest.FixtureRequest) -> None:
    whole, _ = computed(name)
    request.getfixturevalue("small_tiles")
    tiled, pairs = computed(name)
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(whole, tiled))
    assert pairs == PAIRS[name]


@pytest.mark.usefixtures("small_tiles")
def test_tiles_are_compiled_as_one_graph() -> None:
    whole, _ = computed("window")
    compiled, _ = run_alone(computed, "window", True)
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(whole, compiled))


def spans() -> Iterator[Span]:
    for start, stop, first in product(range(9), range(1, 10), range(3)):
        if first <= start < stop:
            yield Span(range(start, stop), range(first, 9), 9)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_have_every_pair_that_is_seen_once(causal: bool, window: int | None) -> None:
    allowed = allowed_keys if causal else allowed_keys_on_both_sides
    for span in spans():
        expected = torch.zeros(9, 9, dtype=torch.bool)
        expected[span.queries.start : span.queries.stop, span.keys.start : span.keys.stop] = True
        whole = allowed(9, window, None, torch.device("cpu"))
        whole = None if whole is None else whole[0, 0]
        found = torch.zeros(9, 9, dtype=torch.int64)
        for tile in span.tiles(causal, window):
            mask = allowed(9, window, None, torch.device("cpu"), span=tile)
            queries, keys = (slice(one.start, one.stop) for one in (tile.queries, tile.keys))
            found[queries, keys] += 1 if mask is None else mask[0, 0]
            assert len(tile.queries) <= 3 and span.keys.start <= tile.keys.start < tile.keys.stop <= span.keys.stop
        seen = torch.ones(9, 9).tril().bool() if causal and whole is None else whole
        expected = expected if seen is None else expected & seen
        assert torch.equal(found, expected.long()), (span, window)
