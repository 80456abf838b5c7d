"""Global batches that change from step to step: five steps equal transformers with the same samples.

The number of micro-batches changes with them, and DeepSpeed counts them to know where a step ends.
"""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ds.engine.base import Engine
from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, train_on, train_ours
from tests.ranks import run_grid

RECIPE = Recipe(global_batch=12, micro_batch=2, batches=(4, 8, 8, 12, 4))
OFFLOADED = (("zero_optimization", {"stage": 2, "offload_optimizer": {"device": "cpu"}}),)
PLACES = [Place(1, 1, 2, 3), replace(Place(1, 1, 2, 2), extra=OFFLOADED), Place(2, 2, 1, 1, True)]
SWEPT = [
    Place(2, 1, 2, 3),
    Place(1, 1, 1, 0),
    Place(1, 1, 2, 1),
    Place(2, 1, 2, 2, True),
    Place(1, 4, 1, 1),
    Place(1, 2, 2, 1),
    Place(1, 1, 2, 0),
    Place(1, 1, 2, 1, cp=2),
]


@pytest.mark.parametrize("place", [*PLACES, *(pytest.param(one, marks=pytest.mark.sweep) for one in SWEPT)], ids=str)
def test_five_steps_equal_transformers(place: Place, references: Any) -> None:
    directory, reference = references("llama", RECIPE)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors


@pytest.mark.sweep
def test_experts(references: Any) -> None:
    directory, reference = references("qwen2_moe-windows-dense-first", RECIPE)
    errors = relative_errors(train_ours(directory, Place(1, 1, 2, 1, expert=2), RECIPE), reference)
    assert within_fp32(errors), errors


def _counts_on(grid: Any, directory: Any, place: Place) -> dict[str, Any]:
    set_accumulation = Engine._set_accumulation

    def keep_count(self: Any, number: int) -> None:
        begun = self.deepspeed.micro_steps
        set_accumulation(self, number)
        self.deepspeed.micro_steps = begun

    Engine._set_accumulation = keep_count  # type: ignore[method-assign]
    return train_on(grid, directory, place, RECIPE)


def test_an_engine_that_counts_on_from_the_step_before_is_seen(references: Any) -> None:
    """It updates the weights in the middle of a step."""
    directory, reference = references("llama", RECIPE)
    errors = relative_errors(run_grid(_counts_on, PLACES[1].layout, directory, PLACES[1])[0], reference)
    assert errors["weights"] > 1e-2, errors
