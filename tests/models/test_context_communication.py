"""Counted bytes of a layer on context ranks equal the formulas, exactly.

Of s positions of a rank, a batch of b, heads of d elements, n query and k key heads of a tensor rank, each rank sends,
in elements: by Ulysses among u ranks, (s b d)(2n + 2m u)(u - 1)/u forward and as many backward, with m key heads for
the n/u query heads of a rank; around a ring of r ranks, 2 s b k d (r - 1) forward, and as many backward, with
2 s b k d r more in fp32; and where keys are fetched, those that the other ranks' queries see, forward, and as many as
it has fetched, backward.
"""

from dataclasses import replace
from fractions import Fraction
from itertools import chain

import pytest
import torch

from megatron_ds.hf.config import read_model
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.layers.recompute import Recompute
from megatron_ds.layers.rotary import RotaryTable
from megatron_ds.models.block import Block
from megatron_ds.models.context import BuildContext
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.parallel.context import ContextParallel, Runs
from megatron_ds.parallel.grid import Grid, Layout
from megatron_ds.parallel.tensor import TensorParallel
from tests.parallel.wire_bytes import counting
from tests.parity.cases import CONFIGS
from tests.parity.family_cases import FAMILY_CASES
from tests.ranks import run_grid

S, B, FLOAT_BYTES = 32, 3, 4
CASES = {**CONFIGS, **FAMILY_CASES}


def _block(grid: Grid, case: str, method: str, mode: str) -> dict[str, dict[str, Fraction]]:
    """Bytes by kind in the forward and in the backward pass of the first layer."""
    config = read_model(CASES[case]).core
    context = ContextParallel(grid.context, grid.ulysses, grid.ring, method, zigzag=grid.ring.size > 1)
    at = BuildContext(TensorParallel(grid.tensor, context=context), recompute=Recompute(mode))
    rotary = config.rotary[0] if config.rotary else None
    block = Block(config, 0, at, RotaryTable(rotary, context) if rotary is not None else None)
    for name, parameter in block.named_parameters():
        parameter.data.copy_(initial_shard(name, spec_of(parameter), 1, grid.model_axes))
    x = torch.randn(S // grid.context.size, B, config.hidden_size, requires_grad=True)
    with counting() as forward:
        total = block({"hidden": x})["hidden"].sum()
    with counting() as backward:
        total.backward()
    return {"forward": forward.bytes, "backward": backward.bytes}


def ulysses_bytes(config: DecoderConfig, layout: Layout, u: int) -> Fraction:
    """One way of queries, keys, values and outputs between u ranks."""
    positions, heads = S // layout.context, config.num_heads // layout.tensor
    group, own = config.num_heads // config.num_kv_heads, heads // u
    first = [range(start, start + own) for start in range(0, heads, own)]
    key_heads = max(len({head // group for head in part}) for part in first)
    elements = positions * B * config.head_dim * (2 * heads + 2 * key_heads * u)
    return Fraction(elements * FLOAT_BYTES * (u - 1), u)


def hop_bytes(config: DecoderConfig, layout: Layout, u: int) -> int:
    """Keys and values that a rank has after the exchange of heads, once."""
    positions, heads = S // layout.context * u, config.num_heads // layout.tensor // u
    key_heads = max(1, heads * config.num_kv_heads // config.num_heads)
    return 2 * positions * B * key_heads * config.head_dim * FLOAT_BYTES


def wanted(context: ContextParallel, window: int | None) -> list[set[int]]:
    """For each rank of the ring the positions of others that its queries see, pair by pair."""
    found = []
    for rank in range(context.ring.size):
        own = positions_of(context.ring_runs(S, rank))
        seen = {key for query in own for key in range(max(0, query - (window or S) + 1), query + 1)}
        found.append(seen - set(own))
    return found


@pytest.mark.parametrize(
    ("case", "c", "t", "mode"),
    [
        ("llama", 2, 1, "none"),
        ("llama", 4, 1, "full"),
        ("llama", 4, 2, "none"),
        ("llama-1kv", 4, 1, "selective"),
        ("qwen2-2kv", 2, 2, "none"),
        ("gpt2", 2, 2, "full"),
    ],
)
def test_heads_are_exchanged_once_each_way(case: str, c: int, t: int, mode: str) -> None:
    layout = Layout(context=c, tensor=t)
    one_way = ulysses_bytes(read_model(CASES[case]).core, layout, c)
    again = 1 if mode == "full" else 0
    for counted in run_grid(_block, layout, case, "gather", mode):
        assert counted["forward"]["all_to_all"] == one_way
        assert counted["backward"]["all_to_all"] == (1 + again) * one_way
        assert "send" not in counted["forward"] and "send" not in counted["backward"]


@pytest.mark.parametrize(
    ("case", "layout", "u", "mode"),
    [
        ("llama", Layout(context=2), 1, "none"),
        ("llama", Layout(context=4), 1, "full"),
        ("llama", Layout(context=4), 2, "none"),
        ("llama-1kv", Layout(context=2, tensor=2), 1, "selective"),
    ],
    ids=str,
)
def test_a_ring_passes_keys_and_values_of_all_ranks_but_one(case: str, layout: Layout, u: int, mode: str) -> None:
    config, r = read_model(CASES[case]).core, layout.context // u
    hop, heads = hop_bytes(config, layout, u), ulysses_bytes(config, layout, u)
    forwards = 2 if mode == "full" else 1
    for counted in run_grid(_block, layout, case, "ring", mode, ulysses=u):
        assert counted["forward"]["send"] == hop * (r - 1)
        assert counted["backward"]["send"] == (forwards * hop * (r - 1)) + hop * r
        assert counted["forward"].get("all_to_all", 0) == heads
        assert counted["backward"].get("all_to_all", 0) == forwards * heads


@pytest.mark.parametrize(
    ("case", "layout", "u", "window", "method"),
    [
        ("llama", Layout(context=2), 1, None, "gather"),
        ("llama", Layout(context=4), 1, None, "gather"),
        ("llama", Layout(context=4), 2, None, "gather"),
        ("mistral", Layout(context=4), 1, 7, "gather"),
        ("mistral", Layout(context=4), 1, 7, "ring"),
        ("gemma2-caps", Layout(context=4), 1, 7, "ring"),
    ],
    ids=str,
)
def test_what_queries_see_is_fetched(case: str, layout: Layout, u: int, window: int | None, method: str) -> None:
    """Keys in a window are fetched by both methods."""
    config, r = read_model(CASES[case]).core, layout.context // u
    heads = ulysses_bytes(config, layout, u)
    context, row = _context_of(layout.context, u), hop_bytes(config, layout, u) * r // S
    others = wanted(context, window)
    for rank, counted in enumerate(run_grid(_block, layout, case, method, "none", ulysses=u)):
        ring = rank // u
        own = set(positions_of(context.ring_runs(S, ring)))
        sent = sum(len(own & other) for other in others)
        assert counted["forward"]["all_to_all"] == heads + sent * row
        assert counted["backward"]["all_to_all"] == heads + len(others[ring]) * row
        assert "send" not in counted["forward"] and "send" not in counted["backward"]


def positions_of(runs: Runs) -> list[int]:
    return list(chain(*runs))


def _context_of(c: int, u: int) -> ContextParallel:
    """The division of positions, without groups."""
    axis = replace(ContextParallel().axis, size=c)
    ulysses, ring = replace(axis, size=u), replace(axis, size=c // u)
    return ContextParallel(axis, ulysses, ring, "gather", zigzag=c > u)


def test_all_positions_are_held_once() -> None:
    """By every division of every length that its ranks divide, and the queries of all ranks see as many keys."""
    for c, u in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4), (6, 2), (8, 2)):
        context = _context_of(c, u)
        for length in (context.multiple_of, 4 * context.multiple_of):
            held = [positions_of(context.runs(length, rank)) for rank in range(c)]
            assert sorted(chain(*held)) == list(range(length)), (c, u, length)
            of_ring = [positions_of(context.ring_runs(length, ring)) for ring in range(c // u)]
            assert [list(chain(*held[ring * u : ring * u + u])) for ring in range(c // u)] == of_ring
            work = {sum(position + 1 for position in positions) for positions in of_ring}
            assert len(work) == 1, (c, u, length)
