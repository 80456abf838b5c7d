"""Five steps of each optimizer equal a single process with torch's or transformers' own, at every layout.

Bounds are those of `test_layouts`. The model's matrices are of several shapes, and its head is tied to its embedding.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ds.engine import matrix_updates
from megatron_ds.engine.optimizers import lion
from megatron_ds.engine.optimizers.adafactor import Adafactor
from megatron_ds.engine.tensor_sums import TensorSums
from megatron_ds.parallel.grid import Grid
from tests.checkpoint.runs import offloaded
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, engine_on, micro_batches, train_ours
from tests.ranks import run_grid

EXPERTS = "mixtral-four-experts"
LLAMA, QWEN2 = "llama", "qwen2-tied"  # the latter has biases, a tied embedding, and a vocabulary that is padded
RECIPES = {
    "lion": Recipe(optimizer="lion", lr=3e-4, betas=(0.9, 0.99), weight_decay=1.0),
    "sgd": Recipe(optimizer="sgd", lr=0.3, options=(("momentum", 0.9), ("nesterov", True)), weight_decay=1e-2),
    "sgd-plain": Recipe(optimizer="sgd", lr=0.3, options=(("momentum", 0.0),), weight_decay=1e-2),
    "adafactor": Recipe(optimizer="adafactor", lr=1e-1),
    "adafactor-momentum": Recipe(
        optimizer="adafactor",
        lr=1e-2,
        options=(("beta1", 0.9), ("scale_parameter", False), ("clip_threshold", 0.5), ("decay_rate", -0.5)),
    ),
}
PLACES = {
    "z0": Place(1, 1, 2, 0),
    "z1": Place(1, 1, 2, 1),
    "z2": Place(1, 1, 2, 2),
    "z3": Place(1, 1, 2, 3),
    "tp2-sp": Place(2, 1, 1, 1, True),
    "tp2-sp-z3": Place(2, 1, 2, 3, True),
    "pp2": Place(1, 2, 1, 1),
    "offload": offloaded(Place(1, 1, 2, 2)),
    "offload-z3": offloaded(Place(1, 1, 2, 3)),
}
SAMPLE = [
    ("lion", "tp2-sp"),
    ("sgd", "pp2"),
    ("sgd", "z2"),
    ("adafactor", "z3"),
    ("adafactor", "pp2"),
    ("adafactor-momentum", "tp2-sp"),
]
CASES = {name: QWEN2 if name.startswith("adafactor") else LLAMA for name in RECIPES}
EVERYTHING = [(name, place) for name in RECIPES for place in PLACES]


def check(name: str, place: str, references: Any) -> None:
    directory, reference = references(CASES[name], RECIPES[name])
    errors = relative_errors(train_ours(directory, PLACES[place], RECIPES[name]), reference)
    assert within_fp32(errors), errors


@pytest.mark.parametrize(("name", "place"), SAMPLE)
def test_five_steps_equal_a_single_process(name: str, place: str, references: Any) -> None:
    check(name, place, references)


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "place"), [pair for pair in EVERYTHING if pair not in SAMPLE])
def test_five_steps_equal_a_single_process_everywhere(name: str, place: str, references: Any) -> None:
    check(name, place, references)


def _update_first(weight: Any, gradient: Any, average: Any, group: Any) -> None:
    average.lerp_(gradient, 1.0 - group["betas"][1])
    weight.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(average.sign(), alpha=-group["lr"])


def _coupled_decay(weight: Any, gradient: Any, average: Any, group: Any, real: Any = lion._update) -> None:
    real(weight, gradient + group["weight_decay"] * weight, average, {**group, "weight_decay": 0.0})


@pytest.mark.parametrize("trap", [_update_first, _coupled_decay])
def test_traps_in_lion_are_seen(trap: Any, references: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, reference = references(LLAMA, RECIPES["lion"])
    monkeypatch.setattr(lion, "_update", trap)
    assert not within_fp32(relative_errors(train_ours(directory, Place(), RECIPES["lion"]), reference))


def _sums_of_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorSums, "reduce", lambda self, sums: None)


def _copies_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_parts(self: Any, plan: Any) -> Any:
        return ((part, plan.places[part.parameter]) for part in plan.sums.parts)

    monkeypatch.setattr(Adafactor, "_counted", all_parts)


def _keys_and_values_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(spec: Any, *, is_vector: bool, real: Any = matrix_updates.as_matrices) -> Any:
        return real(replace(spec, matrices=None), is_vector=is_vector)

    monkeypatch.setattr(matrix_updates, "as_matrices", fused)


@pytest.mark.parametrize("trap", [_sums_of_the_shard, _copies_counted_again, _keys_and_values_in_one])
def test_traps_in_adafactor_are_seen(trap: Any, references: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, reference = references(QWEN2, RECIPES["adafactor"])
    trap(monkeypatch)
    assert not within_fp32(relative_errors(train_ours(directory, PLACES["tp2-sp"], RECIPES["adafactor"]), reference))


OF_EXPERTS = [
    Place(1, 1, 2, 1, expert=2),
    *(
        pytest.param(place, marks=pytest.mark.sweep)
        for place in (
            Place(1, 1, 2, 0, expert=2),
            Place(2, 1, 2, 2, True, expert=4),
            Place(1, 1, 2, 3, expert=2),
            Place(1, 2, 2, 1, expert=2),
            Place(2, 1, 1, 1, True, expert=1),
        )
    ),
]


@pytest.mark.parametrize("place", OF_EXPERTS, ids=str)
def test_experts_are_updated_alike_at_every_layout(place: Place, references: Any) -> None:
    """Each expert has means of its own; transformers has them over all experts of a layer."""
    directory, _ = references(EXPERTS, RECIPES["adafactor"])
    alone, ours = (train_ours(directory, one, RECIPES["adafactor"]) for one in (Place(1, 1, 1, 0), place))
    errors = relative_errors(ours, alone)
    assert within_fp32(errors), errors


def _copies_of_the_tied_embedding(grid: Grid, directory: Path) -> tuple[Tensor, list[Tensor]]:
    place, recipe = PLACES["pp2"], RECIPES["adafactor"]
    engine, model = engine_on(grid, directory, place, recipe)
    for step in range(recipe.steps):
        engine.train_step(micro_batches(grid, place, recipe, step, model.family.model_type), recipe.lr)
    (own,) = [(name, one) for name, one in engine.local_parameters() if one.shape[0] > 128]
    factors = engine.optimizer.whole_state(own[1])
    return own[1].detach().clone(), [one.clone() for one in factors.values()]


def test_stages_update_copies_of_a_tied_embedding_alike(references: Any) -> None:
    """Bit for bit, though their vectors are divided at other places."""
    directory, _ = references(QWEN2, RECIPES["adafactor"])
    (first, factors), (last, others) = run_grid(_copies_of_the_tied_embedding, PLACES["pp2"].layout, directory)
    assert torch.equal(first, last) and len(factors) == 2
    assert all(torch.equal(one, other) for one, other in zip(factors, others))


def test_a_part_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat vectors are updated in chunks, whose size changes nothing."""
    found = []
    for chunk in (2**24, 5):
        monkeypatch.setattr(lion, "_CHUNK", chunk)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 7, generator=generator).requires_grad_()
        optimizer = lion.Lion([weight], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            weight.grad = torch.randn(7, 3, generator=generator).t()
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)
