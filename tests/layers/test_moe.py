"""A mixture of experts equals every expert applied to every token, times its weight: at every layout of its ranks.

The losses of its router are among what is differentiated. Bounds as in `sharded.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ds.layers.mlp import ACTIVATIONS, MLPShape
from megatron_ds.layers.moe.balance import RouterSettings
from megatron_ds.layers.moe.layer import MoE
from megatron_ds.layers.moe.shape import MoEShape, RouterShape
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.layers.recompute import Recompute
from megatron_ds.parallel.expert import ExpertParallel
from megatron_ds.parallel.grid import Axis, Grid, Layout
from megatron_ds.parallel.tensor import TensorParallel
from tests.layers.test_moe_router import weights_of_all
from tests.ranks import run_alone, run_grid

S, B, H, E, FFN = 8, 4, 16, 8, 12
SHARED = MLPShape(
    hidden_size=H, ffn_size=20, activation="silu", gated=True, bias=False, dropout=0.0, std=0.1, out_std=0.1
)
PLAIN = MoEShape(
    hidden_size=H, ffn_size=FFN, router=RouterShape(num_experts=E, top_k=2), activation="silu", std=0.1, out_std=0.1
)
SHAPES = {
    "plain": PLAIN,
    "shared": replace(
        PLAIN,
        router=RouterShape(
            num_experts=E, top_k=3, score="sigmoid", num_groups=4, top_groups=2, choice_bias=True, scale=2.5
        ),
        shared=SHARED,
        aux_loss=0.3,
    ),
    "shared-gate": replace(
        PLAIN, router=RouterShape(num_experts=E, top_k=2, renormalise=False), shared=SHARED, shared_gate=True
    ),
    "limit-biases": replace(
        PLAIN,
        router=RouterShape(num_experts=E, top_k=4, score="softmax_of_chosen", bias=True),
        activation="gelu_sigmoid",
        limit=0.3,
        bias=True,
    ),
    "one expert each": replace(PLAIN, router=RouterShape(num_experts=E, top_k=1, renormalise=False), activation="relu"),
}
PADDED = ("shared", "limit-biases")
"""Of these, positions are padding, which the losses of the router do not count."""
SETTINGS = RouterSettings(aux_loss=0.2, z_loss=0.1, gradient_scale=0.7)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a layer: tensor, data and expert ranks, and sequence parallelism."""

    tensor: int = 1
    data: int = 1
    expert: int | None = None
    sequence: bool = False

    def __str__(self) -> str:
        return f"t{self.tensor}d{self.data}e{self.expert}" + "-sequence" * self.sequence


RANKS = [
    Ranks(),
    Ranks(tensor=2, sequence=True),
    Ranks(tensor=2),
    Ranks(tensor=2, expert=1, sequence=True),
    Ranks(data=2, expert=2),
    Ranks(tensor=2, data=2, expert=4, sequence=True),
    Ranks(tensor=2, data=2, expert=4),
    Ranks(tensor=4, expert=2),
]


def draw(shape: MoEShape) -> dict[str, Tensor]:
    """Full parameters by name, as in a layer on one process, and the bias of the choice."""
    layer = MoE(shape, ExpertParallel(), RouterSettings())
    generator = torch.Generator().manual_seed(5)
    drawn = {
        name: torch.randn(parameter.shape, generator=generator) / 3 for name, parameter in layer.named_parameters()
    }
    if layer.router.choice_bias is not None:
        drawn["router.choice_bias"] = torch.randn(E, generator=generator) / 5
    return drawn


def inputs(length: int = S, batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (S, B, H), the gradient of the output, and a mask of padding (B, S)."""
    generator = torch.Generator().manual_seed(6)
    x, upstream = (torch.randn(length, batch, H, generator=generator) for _ in range(2))
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in range(batch):
        mask[row, length - row * 2 % 5 :] = False
    return x, upstream, mask


# ---- every expert for every token --------------------------------------------------------------------------------


def plain(
    shape: MoEShape, given: dict[str, Tensor], x: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the number of tokens of each expert, and the two losses of the router, of one micro-batch."""
    tokens = x.flatten(0, 1)
    logits = F.linear(tokens, given["router.weight"], given.get("router.bias"))
    weights = weights_of_all(shape.router, logits, given.get("router.choice_bias"))
    found = sum(weights[:, n, None] * _expert(shape, given, tokens, n) for n in range(E))
    if shape.shared is not None:
        gate, up = (F.linear(tokens, half) for half in given["shared.up.weight"])
        shared = F.linear(ACTIVATIONS[shape.shared.activation](gate) * up, given["shared.down.weight"])
        if shape.shared_gate:
            shared = F.linear(tokens, given["shared_gate.weight"]).sigmoid() * shared
        found = found + shared
    real = mask.t().flatten() if mask is not None else torch.ones(len(tokens), dtype=torch.bool)
    scores = logits.sigmoid() if shape.router.score == "sigmoid" else logits.softmax(-1)
    fractions = (weights[real] != 0).float().mean(0) / shape.router.top_k  # of the choices, to each expert
    balance = E * (fractions * (scores / scores.sum(-1, keepdim=True))[real].mean(0)).sum()
    z = logits[real].exp().sum(-1).log().square().mean()
    return found.view_as(x), (weights[real] != 0).sum(0), balance, z


def _expert(shape: MoEShape, given: dict[str, Tensor], tokens: Tensor, n: int) -> Tensor:
    wide = [F.linear(tokens, given["experts.up_weight"][n, half]) for half in (0, 1)]
    if shape.bias:
        wide = [one + given["experts.up_bias"][n, half] for half, one in enumerate(wide)]
    gate, up = wide
    if shape.limit is not None:
        gate, up = torch.minimum(gate, torch.tensor(shape.limit)), up.clamp(-shape.limit, shape.limit) + 1
    narrow = F.linear(up * ACTIVATIONS[shape.activation](gate), given["experts.down_weight"][n])
    return narrow + given["experts.down_bias"][n] if shape.bias else narrow


def _expected(data: int) -> dict[str, dict[str, Tensor]]:
    """For each shape the output, its gradient with respect to everything, and the sums of the routers' loads."""
    expected = {}
    for name, shape in SHAPES.items():
        given = {key: value.requires_grad_(key != "router.choice_bias") for key, value in draw(shape).items()}
        x, upstream, mask = inputs()
        x.requires_grad_()
        outputs, loads, total = [], torch.zeros(E + 2), torch.zeros(())
        for part, gradient, real in zip(x.chunk(data, 1), upstream.chunk(data, 1), mask.chunk(data)):
            output, counts, balance, z = plain(shape, given, part, real if name in PADDED else None)
            losses = SETTINGS.aux_loss * balance + SETTINGS.z_loss * z
            total = total + (output * gradient).sum() + SETTINGS.gradient_scale * losses
            outputs.append(output.detach())
            loads += torch.cat([counts.float(), torch.stack([balance, z]).detach()])
        total.backward()
        gradients = {key: value.grad for key, value in given.items() if value.grad is not None}
        expected[name] = {"output": torch.cat(outputs, 1), "x": x.grad, "loads": loads, **gradients}
    return expected  # type: ignore[return-value]


# ---- the layer ---------------------------------------------------------------------------------------------------


def build(grid: Grid | None, shape: MoEShape, sequence: bool = False, settings: RouterSettings = SETTINGS) -> MoE:
    """A rank's layer with its part of the drawn parameters."""
    tp = TensorParallel(grid.tensor, sequence) if grid is not None else TensorParallel()
    parallel = ExpertParallel(grid.expert, tp) if grid is not None else ExpertParallel(tp=tp)
    layer, given = MoE(shape, parallel, settings), draw(shape)
    axes = {**tp.axes, **parallel.axes}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            own = tuple(slice(*bounds) for bounds in spec_of(parameter).local_ranges(axes))
            parameter.copy_(given[name][own])
        if layer.router.choice_bias is not None:
            layer.router.choice_bias.copy_(given["router.choice_bias"])
    return layer


def _on_ranks(grid: Grid, sequence: bool) -> dict[str, dict[str, Any]]:
    found = {}
    for name, shape in SHAPES.items():
        layer = build(grid, shape, sequence)
        tp = layer.parallel.tp
        x, upstream, mask = (one.chunk(grid.batch.size, dim)[grid.batch.rank] for one, dim in zip(inputs(), (1, 1, 0)))
        own = tp.sequence_slice(S)
        mine = x[own].clone().requires_grad_()
        output = layer(mine, mask if name in PADDED else None)
        output.backward(upstream[own])
        places = {}
        for key, parameter in layer.named_parameters():
            spec, axes = spec_of(parameter), grid.model_axes
            if spec.is_of_experts or spec.holds_first(axes):
                places[key] = spec.local_ranges(axes), parameter.grad
        found[name] = {"output": output, "x": mine.grad, "loads": layer.load.sums, "places": places}
    return found


def _joined(ranks: Ranks, parts: list[Tensor]) -> Tensor:
    """Put the parts of a tensor (S, B, H) together. Without sequence parallelism all tensor ranks have the same."""
    rows = []
    for data in range(ranks.data):
        same = parts[data * ranks.tensor : (data + 1) * ranks.tensor]
        for other in same if not ranks.sequence else ():
            torch.testing.assert_close(other, same[0], rtol=1e-5, atol=1e-5)
        rows.append(torch.cat(same) if ranks.sequence else same[0])
    return torch.cat(rows, 1)


@pytest.fixture(scope="module")
def expected() -> Callable[[int], dict[str, dict[str, Tensor]]]:
    """Number of data ranks -> `_expected`."""
    return cache(partial(run_alone, _expected))


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_outputs_gradients_and_losses_equal_every_expert_on_every_token(ranks: Ranks, expected: Any) -> None:
    layout = Layout(tensor=ranks.tensor, data=ranks.data)
    found = run_grid(_on_ranks, layout, ranks.sequence, expert=ranks.expert)
    for name, whole in expected(ranks.data).items():
        parts = [rank[name] for rank in found]
        joined = {key: _joined(ranks, [part[key] for part in parts]) for key in ("output", "x")}
        joined["loads"] = sum(part["loads"] for part in parts).float()
        for key, tensor in whole.items():
            if key not in joined:
                joined[key] = torch.zeros_like(tensor)
                for part in parts:
                    for bounds, gradient in [part["places"][key]] if key in part["places"] else []:
                        joined[key][tuple(slice(*one) for one in bounds)] += gradient
            torch.testing.assert_close(
                joined[key],
                tensor,
                rtol=1e-5,
                atol=1e-5,
                msg=lambda text: f"{name} {key}: {text}",  # noqa: B023
            )


# ---- single properties -------------------------------------------------------------------------------------------


def test_a_permuted_batch_gives_the_permuted_output() -> None:
    layer = build(None, SHAPES["shared-gate"]).eval()
    x, order = inputs(batch=16)[0], torch.randperm(16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=1e-6, atol=1e-6)


def _repeated(grid: Grid) -> bool:
    found = []
    for _ in range(2):
        layer = build(grid, SHAPES["shared"], sequence=True)
        x, upstream, _ = inputs()
        own = layer.parallel.tp.sequence_slice(S)
        mine = x[own].clone().requires_grad_()
        layer(mine).backward(upstream[own])
        found.append([mine.grad, *(one.grad for one in layer.parameters())])
    return all(torch.equal(*pair) for pair in zip(*found))


def test_the_same_again_is_the_same_to_the_bit() -> None:
    assert all(run_grid(_repeated, Layout(tensor=2)))


def _few_tokens(grid: Grid, length: int, favourite: int) -> tuple[Tensor, list[Tensor]]:
    """Fewer tokens than ranks and experts; every token prefers one expert."""
    layer = build(grid, SHAPES["one expert each"])
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[favourite] = 1
    x = inputs(length, 1)[0].abs().requires_grad_()
    output = layer(x)
    output.sum().backward()
    return output, [x.grad, *(one.grad for one in layer.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize(("length", "favourite"), [(1, 0), (1, 7), (3, 5)])
def test_ranks_without_tokens_or_rows_take_part(length: int, favourite: int) -> None:
    """One token on 4 tensor ranks without sequence parallelism: three have no token, three have no row."""
    expected, gradients = run_grid(_few_tokens, Layout(), length, favourite)[0]
    for output, (x, *others) in run_grid(_few_tokens, Layout(tensor=4), length, favourite, timeout_s=20):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x, gradients[0], rtol=1e-5, atol=1e-5)
        assert all(gradient is not None for gradient in others)


def _counted(mode: str) -> tuple[Tensor, list[Tensor]]:
    layer = build(None, SHAPES["plain"])
    x, upstream, _ = inputs()
    x.requires_grad_()
    Recompute(mode).run("full", layer, x).backward(upstream)
    layer.eval()
    layer(x)
    return layer.load.sums, [x.grad, *(one.grad for one in layer.parameters())]  # type: ignore[list-item]


def test_recomputation_and_evaluation_count_no_token() -> None:
    (sums, gradients), (again, recomputed) = _counted("none"), _counted("full")
    assert sums[:-2].sum() == S * B * 2 and torch.equal(sums, again)
    for one, other in zip(gradients, recomputed):
        assert torch.equal(one, other)


def test_initial_experts_do_not_depend_on_their_ranks() -> None:
    """Nor on the number of experts: each is drawn by itself."""
    shards = {}
    for size in (1, 2, 4, 8):
        parts = []
        for rank in range(size):
            layer = MoE(PLAIN, ExpertParallel(Axis(size, rank, tuple(range(size)))), SETTINGS)
            spec = spec_of(layer.experts.up_weight)
            parts.append(initial_shard("experts.up_weight", spec, 7, layer.parallel.axes))
            assert parts[-1].shape == layer.experts.up_weight.shape
        shards[size] = torch.cat(parts)
    assert all(torch.equal(whole, shards[1]) for whole in shards.values())
    assert abs(float(shards[1].std()) - PLAIN.std) < 0.1 * PLAIN.std and not torch.equal(shards[1][0], shards[1][1])
    fewer = replace(spec, shape=(3, *spec.shape[1:]))
    assert torch.equal(initial_shard("experts.up_weight", fewer, 7, ExpertParallel().axes), shards[1][:3])


def test_a_coefficient_of_the_run_replaces_the_models() -> None:
    """`None` leaves the model's, 0 turns the loss off."""
    x, upstream, _ = inputs()
    found = {}
    for name, given in {"model": None, "off": 0.0, "same": 0.3}.items():
        layer = build(None, SHAPES["shared"], settings=RouterSettings(aux_loss=given))
        layer(x).backward(upstream)
        found[name] = layer.router.weight.grad
    assert torch.equal(found["model"], found["same"]) and not torch.equal(found["model"], found["off"])
