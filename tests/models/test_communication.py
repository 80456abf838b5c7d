"""Counted bytes equal the formulas, exactly (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2).

Per layer and micro-batch of b sequences of s tokens and width h, on t tensor ranks, each rank puts on the wire, in
elements: 8 bsh(t-1)/t without sequence parallelism (four all-reduces of bsh), 10 bsh(t-1)/t with it (five pairs'
halves: Megatron gathers the column-parallel input again in the backward pass). Added to that are the gradients of the
replicated parameters that a rank sees in part: norms and row-parallel biases with sequence parallelism, q/k norms
always, one all-reduce each.
"""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch

from megatron_ds.hf.config import read_model
from megatron_ds.layers.moe.balance import RouterSettings
from megatron_ds.layers.moe.layer import MoE
from megatron_ds.layers.moe.shape import MoEShape, RouterShape
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.layers.recompute import Recompute
from megatron_ds.layers.rotary import RotaryTable
from megatron_ds.models.block import Block, BlockInputs
from megatron_ds.models.context import BuildContext
from megatron_ds.models.gpt import DecoderConfig
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.grid import Grid, Layout, create_grid
from megatron_ds.parallel.rank_info import RankInfo
from megatron_ds.parallel.tensor import TensorParallel
from tests.parallel.wire_bytes import Activations, counting
from tests.parity.cases import CONFIGS, SEQ, VOCAB, Recipe
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.ours import Place, engine_on, micro_batches
from tests.parity.reference import train_reference
from tests.ranks import run_alone, run_grid, run_ranks

S, B, FLOAT_BYTES = 16, 3, 4
CONTEXT = 24


def ring(elements: int, t: int, passes: int = 1) -> Fraction:
    """Bytes of `passes` ring passes over a fp32 tensor: 1 for a gather or scatter, 2 for an all-reduce."""
    return Fraction(passes * elements * FLOAT_BYTES * (t - 1), t)


def partial_parameters(config: DecoderConfig, sequence: bool) -> list[int]:
    """Sizes of a block's replicated parameters whose gradient is summed over the tensor axis."""
    h, sizes = config.hidden_size, []
    if sequence:
        sizes += [h, h] * (2 if config.norm.kind == "layer" else 1)
        sizes += [h] * (config.attention_out_bias + config.mlp_bias)
    if config.qk_norm is not None:
        sizes += [config.head_dim, config.head_dim]
    return sizes


def block_bytes(config: DecoderConfig, t: int, sequence: bool, recomputed: bool = False) -> Fraction:
    """A layer's bytes, forward and backward.

    Full recomputation repeats the forward half but for its last reduction, whose result no gradient needs.
    """
    bsh = B * S * config.hidden_size
    forward = ring(bsh, t, 4)
    backward = ring(bsh, t, 6 if sequence else 4)
    partial = sum((ring(size, t, 2) for size in partial_parameters(config, sequence)), Fraction(0))
    again = ring(bsh, t, 3 if sequence else 2) if recomputed else 0
    return forward + again + backward + partial + shared_heads_bytes(config, t)


def shared_heads_bytes(config: DecoderConfig, t: int) -> Fraction:
    """The gradients of keys and values, summed over the ranks that hold the same heads: an all-reduce of them all."""
    if config.num_kv_heads % t == 0:
        return Fraction(0)
    elements = 2 * config.num_kv_heads * config.head_dim * (config.hidden_size + config.qkv_bias)
    return ring(elements, t, 2)


def _block(grid: Grid, case: str, sequence: bool, mode: str, tile: int | None = None) -> dict[str, Any]:
    config = read_model(CONFIGS[case]).core
    at = BuildContext(TensorParallel(grid.tensor, sequence), recompute=Recompute(mode), mlp_tile_tokens=tile)
    rotary = config.rotary[0] if config.rotary else None
    block = Block(config, 0, at, RotaryTable(rotary) if rotary is not None else None)
    for name, parameter in block.named_parameters():
        spec = spec_of(parameter)
        parameter.data.copy_(initial_shard(name, spec, 1, grid.model_axes))
    length = S // grid.tensor.size if sequence else S
    x = torch.randn(length, B, config.hidden_size, requires_grad=True)
    with counting() as wire:
        block({"hidden": x})["hidden"].sum().backward()
    return {"total": wire.total, "by_kind": wire.bytes, "calls": sum(wire.calls.values())}


@pytest.mark.parametrize("t", [2, 4])
@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize(
    ("case", "mode"),
    [
        ("gpt2", "none"),
        ("llama", "none"),
        ("llama", "full"),
        ("qwen3", "none"),
        ("qwen3", "selective"),
        ("qwen2-2kv", "none"),
    ],
)
def test_a_layer_moves_what_the_papers_say(case: str, mode: str, sequence: bool, t: int) -> None:
    config = read_model(CONFIGS[case]).core
    expected = block_bytes(config, t, sequence, recomputed=mode == "full")
    for counted in run_grid(_block, Layout(tensor=t), case, sequence, mode):
        assert counted["total"] == expected, counted
        if sequence and config.num_kv_heads % t == 0:
            # only parameters' gradients are all-reduced; activations are gathered and scattered
            partial = sum(ring(size, t, 2) for size in partial_parameters(config, sequence))
            assert counted["by_kind"].get("all_reduce", 0) == partial


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_tiles_move_no_more_than_the_recomputation_of_their_layer(mode: str, sequence: bool) -> None:
    """The tiles gather the MLP's input once more, if it is divided, and do not repeat its reduction."""
    config = read_model(CONFIGS["llama"]).core
    expected = block_bytes(config, 2, sequence, recomputed=mode == "full")
    if mode == "none" and sequence:
        expected += ring(B * S * config.hidden_size, 2)
    whole, tiled = (run_grid(_block, Layout(tensor=2), "llama", sequence, mode, tile)[0] for tile in (None, 2 * B))
    assert tiled["total"] == expected
    assert tiled["calls"] > whole["calls"]


def _cross_block(grid: Grid, sequence: bool) -> Fraction:
    config = read_model(ENCODER_CASES["t5-gated"]).core.decoder
    inputs = BlockInputs("decoder_attention_mask", "encoded", "attention_mask")
    block = Block(config, 0, BuildContext(TensorParallel(grid.tensor, sequence)), inputs=inputs)
    for name, parameter in block.named_parameters():
        spec = spec_of(parameter)
        parameter.data.copy_(initial_shard(name, spec, 1, grid.model_axes))
    parts = grid.tensor.size if sequence else 1
    states = [torch.randn(length // parts, B, config.hidden_size, requires_grad=True) for length in (S, CONTEXT)]
    with counting() as wire:
        block({"hidden": states[0], "encoded": states[1]})["hidden"].sum().backward()
    return wire.total


@pytest.mark.parametrize("t", [2, 4])
@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
def test_cross_attention_moves_both_stacks_states(sequence: bool, t: int) -> None:
    """As the block's docstring says: 4 SBH + 2 CBH beside the 8 SBH; or 5 and 3 beside the 10, and three norms."""
    hidden = read_model(ENCODER_CASES["t5-gated"]).core.hidden_size
    own, other = B * S * hidden, B * CONTEXT * hidden
    passes = (15, 3) if sequence else (12, 2)
    expected = ring(own, t, passes[0]) + ring(other, t, passes[1])
    if sequence:
        expected += 3 * ring(hidden, t, 2)
    assert run_grid(_cross_block, Layout(tensor=t), sequence) == [expected] * t


EXPERTS, TOP_K, WIDTH = 8, 2, 16


def _experts(info: RankInfo, layout: Layout, e: int, sequence: bool) -> Activations:
    """A layer whose tokens choose all experts alike: token i of a rank experts i and i + 1, modulo their number."""
    grid = create_grid(layout, info.rank, e)
    router = RouterShape(num_experts=EXPERTS, top_k=TOP_K)
    shape = MoEShape(hidden_size=WIDTH, ffn_size=8, router=router, activation="silu", std=0.1, out_std=0.1)
    parallel = ExpertParallel(grid.expert, TensorParallel(grid.tensor, sequence))
    layer = MoE(shape, parallel, RouterSettings(aux_loss=0.1, z_loss=0.1))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(EXPERTS, WIDTH))
    ids = torch.arange(S * EXPERTS // (grid.tensor.size if sequence else 1))
    chosen = torch.eye(WIDTH)[ids % EXPERTS] + 0.5 * torch.eye(WIDTH)[(ids + 1) % EXPERTS]
    x = chosen.view(-1, EXPERTS, WIDTH).requires_grad_()
    with counting() as wire:
        layer(x).sum().backward()
    assert layer.load.sums[:EXPERTS].unique().numel() == 1, "tokens are routed uniformly"
    return wire


@pytest.mark.parametrize(
    ("layout", "e", "sequence"),
    [
        (Layout(tensor=2), 2, False),
        (Layout(tensor=2), 2, True),
        (Layout(tensor=2), 1, True),
        (Layout(data=2), 2, False),
        (Layout(tensor=4), 4, False),
        (Layout(tensor=2, data=2), 4, False),
        (Layout(tensor=2, data=2), 4, True),
    ],
    ids=lambda one: "x".join(map(str, one.values())) if isinstance(one, Layout) else str(one),
)
def test_experts_move_what_the_layer_says(layout: Layout, e: int, sequence: bool) -> None:
    """As the docstring of `MoE` says, for T = SB/t tokens of a rank."""
    t, tokens = layout.tensor, S * EXPERTS // layout.tensor
    exchanged = ring(TOP_K * tokens * WIDTH, e, 4) + ring(2 * EXPERTS, e)  # counts are int64
    gathered = Fraction(0) if sequence else ring(S * EXPERTS * WIDTH, t, 2)
    summed = ring(EXPERTS * WIDTH + EXPERTS + 1, t, 2)
    for wire in run_ranks(_experts, layout.world_size, layout, e, sequence):
        assert wire.bytes.get("all_to_all", 0) == exchanged
        assert wire.total == exchanged + gathered + summed, wire.bytes


def _model(grid: Grid, case: str, sequence: bool) -> Fraction:
    config = read_model(CONFIGS[case]).core
    model = SequentialModel(config.build_layers(BuildContext(TensorParallel(grid.tensor, sequence))))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(0))
    with counting() as wire:
        model({"input_ids": ids}, {"targets": ids}).sum().backward()
    return wire.total


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_embedding_and_head_never_gather_logits(case: str, sequence: bool) -> None:
    """Embedding: one reduction of bsh (and a gather back); head: one of bsh, and 3 numbers a token for the softmax."""
    t, config = 2, read_model(CONFIGS[case]).core
    bsh = B * S * config.hidden_size
    embedding = ring(bsh, t, 2)
    head = ring(bsh, t, 2) + ring(3 * B * S, t, 2)
    outside: list[int] = []
    if sequence:
        outside += [config.hidden_size] * (2 if config.norm.kind == "layer" else 1)  # final norm
        outside += [config.positions.rows * config.hidden_size] if config.positions is not None else []
    rest = sum((ring(size, t, 2) for size in outside), Fraction(0))
    expected = config.num_layers * block_bytes(config, t, sequence) + embedding + head + rest
    assert run_grid(_model, Layout(tensor=t), case, sequence) == [expected] * t


def _pipeline(grid: Grid, directory: Any, place: Any, recipe: Any) -> Fraction:
    engine, _ = engine_on(grid, directory, place, recipe)
    engine.train_step(micro_batches(grid, place, recipe, 0), recipe.lr)  # the first step also sends shapes
    with counting() as wire:
        engine.train_step(micro_batches(grid, place, recipe, 1), recipe.lr)
    own = place.layout.coords(grid.rank).pipeline  # messages within a stage are its tensor ranks' gathers and scatters
    across = (size for rank, size in wire.sent_to.items() if place.layout.coords(rank).pipeline != own)
    return sum(across, Fraction(0))


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (1, 4), (2, 2)])
def test_a_pipeline_moves_one_activation_a_boundary_each_way(tp: int, pp: int, tmp_path: Any) -> None:
    recipe, place = Recipe(), Place(tp, pp, 1, 1, tp > 1)
    run_alone(train_reference, "llama", replace(recipe, steps=0), tmp_path)
    hidden = read_model(CONFIGS["llama"]).core.hidden_size
    activation = recipe.global_batch * SEQ * hidden * FLOAT_BYTES // tp  # a rank's part of the sequence
    sent = run_grid(_pipeline, place.layout, tmp_path, place, recipe)
    for rank, size in enumerate(sent):
        stage = place.layout.coords(rank).pipeline
        boundaries = (stage > 0) + (stage < pp - 1)
        assert size == boundaries * activation, (rank, sent)
