"""Five steps of each optimizer equal a single process with torch's or transformers' own, at every layout.

Bounds are those of `test_layouts`. The model's matrices are of several shapes, and its head is tied to its embedding.
"""

from typing import Any

import pytest
import torch

from megatron_ds.engine.optimizers import lion
from tests.checkpoint.runs import offloaded
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, train_ours

CASE = "llama"
RECIPES = {
    "lion": Recipe(optimizer="lion", lr=3e-4, betas=(0.9, 0.99), weight_decay=1.0),
    "sgd": Recipe(optimizer="sgd", lr=0.3, options=(("momentum", 0.9), ("nesterov", True)), weight_decay=1e-2),
    "sgd-plain": Recipe(optimizer="sgd", lr=0.3, options=(("momentum", 0.0),), weight_decay=1e-2),
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
SAMPLE = [("lion", "tp2-sp"), ("lion", "z3"), ("sgd", "pp2"), ("sgd", "z2"), ("sgd-plain", "z0")]
EVERYTHING = [(name, place) for name in RECIPES for place in PLACES]


def check(name: str, place: str, references: Any) -> None:
    directory, reference = references(CASE, RECIPES[name])
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
def test_traps_are_seen(trap: Any, references: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, reference = references(CASE, RECIPES["lion"])
    monkeypatch.setattr(lion, "_update", trap)
    assert not within_fp32(relative_errors(train_ours(directory, Place(), RECIPES["lion"]), reference))


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
