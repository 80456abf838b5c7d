"""A step whose loss or gradient is not finite leaves no trace, at every stage of ZeRO and in pipelines."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.models.sequential import OutputHead
from megatron_ds.parallel.grid import Grid
from tests.halves import swept
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_on, micro_batches
from tests.ranks import run_grid

RECIPE = Recipe(steps=4)
BAD = 2


def _poison(engine: Any, kind: str) -> None:
    """Make a gradient and the loss NaN, or the loss alone infinite, or gradients alone, until it is taken back."""
    module = engine.deepspeed.module
    stages = module.forward_funcs if hasattr(module, "forward_funcs") else list(module.children())
    last = stages[-1]
    real = last.forward
    engine.cure = lambda: setattr(last, "forward", real)
    if not isinstance(last, OutputHead):
        return

    def forward(*given: Any) -> Any:
        losses = real(*given)
        if kind == "gradients alone":
            losses.register_hook(lambda grad: grad * float("inf"))
            return losses
        return losses * float("nan") if kind == "gradient" else losses + float("inf")

    last.forward = forward


def _run(grid: Grid, directory: Path, place: Place, recipe: Recipe, kind: str) -> list[Any]:
    """Steps with one that is poisoned in the middle, or without it at all."""
    engine, _ = engine_on(grid, directory, place, recipe)
    seen = []
    for step in range(recipe.steps):
        batches = micro_batches(grid, place, recipe, step)
        if step == BAD and kind != "none":
            _poison(engine, kind)
            result = engine.train_step(batches, recipe.lr)
            engine.cure()
            seen.append((result.applied, torch.tensor(result.loss).isfinite().item()))
        result = engine.train_step(batches, recipe.lr)
        seen.append((result.loss, result.grad_norm, result.applied))
    return seen


PLACES = [
    Place(1, 1, 1, 0),
    Place(1, 1, 2, 3),
    Place(2, 2, 1, 1, True),
    *swept(Place(1, 1, 2, 0), Place(2, 1, 1, 1, True), Place(1, 1, 2, 2), Place(2, 1, 2, 3)),
]


@pytest.fixture(scope="module")
def good_run() -> Callable[[Path, Place, Recipe], list[Any]]:
    """Return a function of a directory, a place and a recipe -> what the ranks see without a bad step, made once."""
    return cache(lambda directory, place, recipe: run_grid(_run, place.layout, directory, place, recipe, "none"))


@pytest.mark.parametrize("kind", ["gradient", "loss"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_bad_step_leaves_no_trace(place: Place, kind: str, references: Any, good_run: Any) -> None:
    directory, _ = references("llama", RECIPE)
    good = good_run(directory, place, RECIPE)
    bad = run_grid(_run, place.layout, directory, place, RECIPE, kind)
    for with_it, without in zip(bad, good):
        assert with_it[BAD] == (False, False)
        assert with_it[:BAD] + with_it[BAD + 1 :] == without
        assert all(applied for *_, applied in without)


@pytest.mark.parametrize(
    "place",
    [Place(1, 2, 1, 1), *(pytest.param(Place(1, 1, 2, zero), marks=pytest.mark.sweep) for zero in (1, 2))],
    ids=str,
)
def test_in_bf16_too(place: Place, references: Any) -> None:
    directory, _ = references("llama", RECIPE)
    bf16 = replace(RECIPE, precision="bf16")
    good = run_grid(_run, place.layout, directory, place, bf16, "none")[0]
    for kind in ("gradient", "loss"):
        bad = run_grid(_run, place.layout, directory, place, bf16, kind)[0]
        assert bad[BAD] == (False, False) and bad[:BAD] + bad[BAD + 1 :] == good


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOADED = [Place(1, 1, 1, zero, extra=(("zero_optimization", {"stage": zero, **OFFLOAD}),)) for zero in (2, 3)]


@pytest.mark.parametrize("place", [Place(1, 1, 1, 3), *OFFLOADED], ids=["zero3", "zero2 offload", "zero3 offload"])
def test_gradients_that_are_not_finite_are_seen_without_the_loss(place: Place, references: Any) -> None:
    """As in fp16, whose scaled gradients overflow."""
    directory, _ = references("llama", RECIPE)
    good = run_grid(_run, place.layout, directory, place, RECIPE, "none")[0]
    bad = run_grid(_run, place.layout, directory, place, RECIPE, "gradients alone")[0]
    assert bad[BAD] == (False, True) and bad[:BAD] + bad[BAD + 1 :] == good
