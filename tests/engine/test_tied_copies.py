"""Pipeline stages that hold copies of a tied parameter update them alike, wherever DeepSpeed keeps gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ds.parallel.grid import Grid
from megatron_ds.runtime import load_model
from tests.parity.cases import CONFIGS, Recipe
from tests.parity.ours import Place, engine_config, micro_batches, session_of
from tests.ranks import run_grid

PLACE = Place(1, 2, 1, 1)
OFFLOADED = replace(PLACE, extra=(("zero_optimization", {"stage": 1, "offload_optimizer": {"device": "cpu"}}),))


def _embedding_after_two_steps(grid: Grid, place: Place, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    model = load_model(CONFIGS["gpt2"])
    engine = session_of(grid).build_engine(model, engine_config(place, recipe)).engine
    (weight,) = (one for name, one in engine.local_parameters() if name == "embedding.weight")
    first = weight.detach().clone()
    for step in range(2):
        engine.train_step(micro_batches(grid, place, recipe, step), recipe.lr)
    return first, weight.detach()


@pytest.mark.parametrize(
    ("place", "precision"),
    [(OFFLOADED, "bf16"), pytest.param(PLACE, "bf16", marks=pytest.mark.sweep), (OFFLOADED, "fp32")],
    ids=["offloaded-bf16", "bf16", "offloaded"],
)
def test_copies_stay_equal(place: Place, precision: str) -> None:
    found: list[Any] = run_grid(_embedding_after_two_steps, place.layout, place, Recipe(precision=precision))
    (first, here), (_, there) = found
    assert torch.equal(here, there)
    assert not torch.equal(first, here)
