"""Weight gradients added up in fp32 by their products: the training of DeepSpeed's sums, with fewer roundings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.engine import gradient_sums
from megatron_ds.parallel.grid import Grid
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors
from tests.parity.ours import Place, engine_on, micro_batches, train_on
from tests.parity.test_layouts import BF16_BOUNDS
from tests.ranks import run_grid

RECIPE = replace(Recipe(), precision="bf16", steps=3)
PLACES = [
    Place(),
    Place(2, 1, 1, 1, True),
    Place(1, 2, 1, 1, recompute="full"),
    Place(1, 1, 2, 1),
]


def _train(grid: Grid, directory: Path, place: Place, recipe: Recipe, in_products: bool) -> dict[str, Any]:
    gradient_sums.DEVICES = ("cpu", "cuda") if in_products else ()  # the process ends with the test
    return train_on(grid, directory, place, recipe)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_training_is_that_of_deepspeeds_sums(place: Place, references: Any) -> None:
    """Over steps of several micro-batches, clipped: within the rounding of bf16, and not bit for bit."""
    directory, _ = references("llama", RECIPE)
    ours, theirs = (run_grid(_train, place.layout, directory, place, RECIPE, own)[0] for own in (True, False))
    errors = relative_errors(ours, theirs)
    assert errors["norm"] > 0.0 and all(errors[name] < bound for name, bound in BF16_BOUNDS.items()), errors


def _gradients(grid: Grid, directory: Path, place: Place) -> dict[str, tuple[bool, bool]]:
    """By name, whether a parameter has a bf16 gradient at the step, and whether DeepSpeed counts its fp32 sum."""
    gradient_sums.DEVICES = ("cpu", "cuda")
    engine, _ = engine_on(grid, directory, place, RECIPE)
    names = {id(parameter): name for name, parameter in engine.local_parameters()}
    optimizer, found = engine.deepspeed.optimizer, dict[str, tuple[bool, bool]]()
    step = optimizer.step

    def recording() -> None:
        for group, flags in zip(optimizer.bf16_groups, optimizer.fp32_groups_has_gradients):
            for parameter, is_counted in zip(group, flags):
                found[names[id(parameter)]] = (parameter.grad is not None, is_counted)
        step()

    optimizer.step = recording
    for number in range(2):
        engine.train_step(micro_batches(grid, place, RECIPE, number), RECIPE.lr)
    return found


def test_matrices_have_no_bf16_gradient(references: Any) -> None:
    """Except the embedding. In the norm and in clipping all of them count, after the first step too."""
    directory, _ = references("llama", RECIPE)
    found = run_grid(_gradients, Place().layout, directory, Place())[0]
    rounded = {name for name, (has_gradient, _) in found.items() if has_gradient}
    assert rounded == {name for name in found if "norm" in name or name.startswith("embedding")}, found
    assert all(is_counted for _, is_counted in found.values()), found
