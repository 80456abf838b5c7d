"""A feed-forward layer in tiles equals plain torch, with all gradients, and keeps no more than its input.

Hidden states are (S, B, H) = (8, 2, 16). A tile of 6 tokens has 3 positions: the last one is shorter, and one tile has
tokens of both sequences.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ds.layers.adapter_layers import IA3Spec, LoRASpec
from megatron_ds.layers.mlp import MLP, MLPShape
from megatron_ds.layers.products import gradient_sum, keep_gradient_sum
from megatron_ds.layers.recompute import Recompute
from megatron_ds.layers.tiled_mlp import TiledMLP
from megatron_ds.layers.xielu import BETA, EPS
from megatron_ds.parallel.grid import Grid, Layout, create_grid
from megatron_ds.parallel.random import RngStreams
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.sharded import LAYOUTS, B, Case, H, S, check
from tests.ranks import run_alone, run_grid

WIDE, TOKENS = 12, 6
CPU = torch.device("cpu")


def shape(activation: str, gated: bool, bias: bool, dropout: float = 0.0) -> MLPShape:
    return MLPShape(H, WIDE, activation, gated, bias, dropout, std=0.3, out_std=0.3)


def build(sizes: MLPShape, tp: TensorParallel) -> TiledMLP:
    return TiledMLP(sizes, tp, tile_tokens=TOKENS)


def gated(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up = F.linear(x, parameters["up.weight"].flatten(0, 1), parameters["up.bias"].flatten()).chunk(2, -1)
    return F.linear(F.silu(gate) * up, parameters["down.weight"], parameters["down.bias"])


def plain(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, parameters["up.weight"])), parameters["down.weight"])


def xielu(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    above, below = (F.softplus(parameters[f"activation.alpha_{sign}"]) for sign in "pn")
    wide = F.linear(x, parameters["up.weight"])
    low = (BETA + below) * (torch.expm1(wide.clamp(max=EPS)) - wide)
    return F.linear(torch.where(wide > 0, above * wide.square(), low) + BETA * wide, parameters["down.weight"])


WEIGHTS = {"up.weight": (WIDE, H), "down.weight": (H, WIDE)}
SPLIT = {"up.weight": 0, "down.weight": 1}
CASES = {
    "gated, bias": Case(
        partial(build, shape("silu", True, True)),
        gated,
        {"up.weight": (2, WIDE, H), "down.weight": (H, WIDE), "up.bias": (2, WIDE), "down.bias": (H,)},
        {"up.weight": 1, "down.weight": 1, "up.bias": 1},
    ),
    "plain": Case(partial(build, shape("gelu", False, False)), plain, WEIGHTS, SPLIT),
    "learned": Case(
        partial(build, shape("xielu", False, False)),
        xielu,
        {**WEIGHTS, "activation.alpha_p": (1,), "activation.alpha_n": (1,)},
        SPLIT,
    ),
}


@pytest.mark.parametrize(("tp", "sequence"), LAYOUTS)
def test_equals_the_formula(tp: int, sequence: bool) -> None:
    check(CASES, tp, sequence)


def filled(layer: MLP) -> MLP:
    torch.manual_seed(3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def gradients(layer: MLP, x: Tensor, wrap: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters that have one."""
    given = x.detach().requires_grad_(x.requires_grad)
    y = layer(given) if wrap is None else wrap(layer, given)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    found = [y.detach(), *(one.grad for one in (given, *layer.parameters()) if one.grad is not None)]
    layer.zero_grad()
    return found


def both(**adapters: Any) -> tuple[MLP, TiledMLP]:
    """A layer and the same in tiles, with adapters of frozen weights."""
    pair = []
    for make in (MLP, partial(TiledMLP, tile_tokens=TOKENS)):
        layer = make(shape("silu", True, False), TensorParallel())
        if adapters:
            layer.requires_grad_(False)
        for name, adapter in adapters.items():
            layer.adapt((name,), adapter)
        pair.append(filled(layer))
    return pair[0], pair[1]


def _equal(**adapters: Any) -> int:
    whole, tiled = both(**adapters)
    for wants_x in (True, False):
        x = torch.randn(S, B, H, requires_grad=wants_x)
        expected, found = gradients(whole, x), gradients(tiled, x)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    return len(expected)


@pytest.mark.parametrize(
    ("adapters", "num_compared"),
    [
        ({}, 3),
        ({"gate": LoRASpec(2, 1.5), "down": LoRASpec(2, 1.5)}, 5),
        ({"down": LoRASpec(2, 1.5, dora=True)}, 4),
        ({"down": IA3Spec(of_input=True)}, 2),
    ],
    ids=["none", "LoRA", "DoRA", "IA3"],
)
def test_adapters_and_inputs_without_a_gradient(adapters: dict[str, Any], num_compared: int) -> None:
    assert run_alone(partial(_equal, **adapters)) == num_compared


def _in_bf16() -> tuple[float, float]:
    """The relative errors of the weight gradients, whole and in tiles, against fp64."""
    torch.manual_seed(1)
    whole, tiled = both()
    exact = filled(MLP(shape("silu", True, False), TensorParallel())).double()
    x = torch.randn(512, B, H)
    rounded = x.bfloat16()
    for one in (whole, tiled):
        one.bfloat16()
    for one, other in zip(exact.parameters(), whole.parameters()):
        one.data.copy_(other)
    expected = gradients(exact, rounded.double())[1:]
    errors = []
    for one in (whole, tiled):
        found = gradients(one, rounded)[1:]
        assert all(gradient.dtype == torch.bfloat16 for gradient in found)
        errors.append(max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected)))
    return errors[0], errors[1]


def test_sums_over_tiles_do_not_round() -> None:
    """171 tiles: sums in bf16 would be off by several percent."""
    whole, tiled = run_alone(_in_bf16)
    assert tiled < 1.1 * whole < 1e-2


def _with_an_engines_sums() -> tuple[bool, bool]:
    whole, tiled = both()
    x = torch.randn(S, B, H, requires_grad=True)
    expected = gradients(whole, x)
    for parameter in tiled.parameters():
        keep_gradient_sum(parameter, torch.ones_like(parameter))
    found = gradients(tiled, x)
    sums = [gradient_sum(parameter) for parameter in tiled.parameters()]
    added = all(
        torch.allclose(total - 1, gradient, rtol=1e-4, atol=1e-5)
        for total, gradient in zip(sums, expected[2:], strict=True)
        if total is not None
    )
    return len(found) == 2, added and all(total is not None for total in sums)


def test_products_add_to_an_engines_sums() -> None:
    assert run_alone(_with_an_engines_sums) == (True, True)


def _streams(grid: Grid) -> RngStreams:
    return RngStreams(7, grid, CPU)


def _tile_by_tile(layer: MLP, x: Tensor) -> Tensor:
    return torch.cat([layer(tile) for tile in x.split(TOKENS // B)])


def _with_dropout(grid: Grid, sequence: bool) -> float:
    """The largest difference to the same masks without recomputation, in three ways to recompute the block around."""
    tp, sizes = TensorParallel(grid.tensor, sequence), shape("gelu", False, True, dropout=0.5)
    torch.manual_seed(1)
    x = torch.randn(S, B, H, requires_grad=True)
    rng = _streams(grid)
    whole, tiled = filled(MLP(sizes, tp, rng)), filled(TiledMLP(sizes, tp, rng, tile_tokens=TOKENS))
    low = LoRASpec(2, 1.0, dropout=0.5)
    for layer in (whole, tiled):
        layer.adapt(("up",), low)
        filled(layer)

    def recomputed(layer: MLP, x: Tensor) -> Tensor:
        return Recompute("full", rng=rng).run("full", layer, x)

    def by_reentrant(layer: MLP, x: Tensor) -> Tensor:
        again = Recompute("full", partial(checkpoint, use_reentrant=True), rng)
        return again.run("full", layer, x)

    rng.begin_step(3)
    expected = gradients(whole, x, _tile_by_tile)
    after = rng.states()
    differences = []
    for wrap in (None, recomputed, by_reentrant):
        rng.begin_step(3)
        found = gradients(tiled, x, wrap)
        assert all(torch.equal(one, other) for one, other in zip(rng.states(), after)), "a replay moved the streams"
        differences += [float((one - other).abs().max()) for one, other in zip(expected, found, strict=True)]
    assert float(expected[0].eq(whole.eval()(x)).float().mean()) < 0.5, "nothing was dropped"
    return max(differences)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_tile_draws_its_masks_again(tp: int, sequence: bool) -> None:
    assert max(run_grid(_with_dropout, Layout(tensor=tp), sequence)) < 1e-4


def _num_calls(mode: str) -> int:
    """How often the first product runs in a forward and backward pass, with a block's recomputation around."""
    layer, calls = build(shape("gelu", False, False), TensorParallel()), []
    layer.up.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    x = torch.randn(S, B, H, requires_grad=True)
    y = Recompute(mode, rng=_streams(create_grid(Layout(), 0))).run("full", lambda x: 2 * x + layer(3 * x), x)
    y.sum().backward()
    return len(calls)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_tiles_run_twice(mode: str) -> None:
    """Three tiles, forward and backward: the recomputation of a block around them does not run them a third time."""
    assert run_alone(_num_calls, mode) == 6


def _kept() -> tuple[int, int]:
    """Elements that autograd keeps of a layer, whole and in tiles, besides parameters."""
    found = []
    for layer in both():
        own = {parameter.data_ptr() for parameter in layer.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            if tensor.data_ptr() not in own:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
            return tensor

        x = torch.randn(S, B, H, requires_grad=True) * 1
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        found.append(sum(kept.values()))
        del y
    return found[0], found[1]


def test_keeps_its_input_alone() -> None:
    whole, tiled = run_alone(_kept)
    assert tiled == S * B * H < whole
