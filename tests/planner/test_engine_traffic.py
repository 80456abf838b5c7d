"""The engine's planned bytes are those that a step of real ranks sends, exactly, by axis and kind."""

from typing import Any

import pytest

from megatron_ds.parallel.grid import Grid
from megatron_ds.planner.engine_traffic import engine_traffic
from tests.halves import halved
from tests.parity.cases import Recipe
from tests.parity.ours import Place
from tests.planner.wire_cases import by_ranks, counted, loaded, messages_by_axis, planned, with_settings
from tests.ranks import run_grid

BF16 = Recipe(precision="bf16")
SMALL = {"reduce_bucket_size": 3000}

WITHOUT_TENSOR_RANKS = [
    ("llama", Place(1, 2, 2, 1), Recipe()),
    ("llama", Place(1, 1, 2, 0), Recipe()),
    ("gpt2", Place(1, 2, 2, 1), BF16),
    ("llama", Place(1, 1, 2, 1), BF16),
    ("llama", with_settings(Place(1, 1, 2, 2), **SMALL), Recipe()),
    ("llama", with_settings(Place(1, 1, 4, 1), **SMALL), Recipe()),
]


def _both(grid: Grid, case: str, place: Place, recipe: Recipe) -> tuple[Any, Any]:
    model = loaded(case, recipe)
    wire = counted(grid, model, place, recipe)
    traffic = engine_traffic(planned(model, place, recipe), grid.coords.pipeline)
    return messages_by_axis(wire, grid), by_ranks(traffic.total, grid)


@pytest.mark.parametrize(("case", "place", "recipe"), halved(WITHOUT_TENSOR_RANKS), ids=str)
def test_planned_bytes_are_those_that_are_sent(case: str, place: Place, recipe: Recipe) -> None:
    for rank, (sent, expected) in enumerate(run_grid(_both, place.layout, case, place, recipe)):
        assert sent == expected, rank
