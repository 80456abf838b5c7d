"""A step waits for its device once, whatever the engine, the stage of ZeRO and the number of micro-batches."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.parallel.grid import Grid
from tests.engine.device_waits import DeviceWaits
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_on, micro_batches
from tests.ranks import run_grid

RECIPE = Recipe(steps=3)


def _waits(grid: Grid, directory: Path, place: Place, recipe: Recipe) -> list[list[str]]:
    """Return the places where each step waits."""
    engine, _ = engine_on(grid, directory, place, recipe)
    seen = []
    for step in range(recipe.steps):
        batches = micro_batches(grid, place, recipe, step)
        with DeviceWaits(column for batch in batches for column in batch.values()) as waits:
            engine.train_step(batches, recipe.lr)
        seen.append(waits.places)
    return seen


PLACES = [Place(1, 1, 1, stage) for stage in (0, 1, 2, 3)] + [Place(1, 2, 1, 1)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_step_waits_once(place: Place, precision: str, references: Any) -> None:
    directory, _ = references("llama", RECIPE)
    for rank in run_grid(_waits, place.layout, directory, place, replace(RECIPE, precision=precision)):
        assert [len(step) for step in rank[1:]] == [1, 1], "\n".join(rank[-1])
