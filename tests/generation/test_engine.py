"""Generation by the module of a live engine: at layouts, after a training step, with other prompts on data ranks."""

from pathlib import Path
from typing import Any, cast

import pytest

from megatron_ds.errors import TopologyError
from megatron_ds.evaluation.continuation import Continuer
from megatron_ds.evaluation.shared_calls import SharedCalls
from megatron_ds.generation import Generator, Sampling
from megatron_ds.parallel.grid import Grid
from tests.generation.models import KINDS, NEW_TOKENS, PROMPTS, continue_by_transformers
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_on, micro_batches
from tests.ranks import rank_device, run_grid

CASE = KINDS["rope, grouped heads"]
RECIPE = Recipe(steps=1)


def generate(grid: Grid, directory: Path, place: Place) -> tuple[list[list[int]], float]:
    """The new ids of this data rank's prompts, and the loss of the step after it."""
    engine, model = engine_on(grid, directory, place, RECIPE)
    prompts = PROMPTS[grid.batch.rank :: grid.batch.size]
    rows = Generator(engine.built, model.core, grid, rank_device()).generate(prompts, NEW_TOKENS)
    return [row.ids for row in rows], engine.train_step(micro_batches(grid, place, RECIPE, 0), RECIPE.lr).loss


def step(grid: Grid, directory: Path, place: Place) -> float:
    engine, _ = engine_on(grid, directory, place, RECIPE)
    return engine.train_step(micro_batches(grid, place, RECIPE, 0), RECIPE.lr).loss


@pytest.mark.parametrize("place", [Place(tp=2), Place(dp=2, zero=2), Place(pp=2, dp=2)], ids=str)
def test_an_engine_generates_and_trains_on(place: Place, once: Any) -> None:
    directory, expected = once(continue_by_transformers, CASE)
    found = run_grid(generate, place.layout, directory, place)
    losses = run_grid(step, place.layout, directory, place)
    for rank, (ids, loss) in enumerate(found):
        data = place.layout.coords(rank).data
        assert ids == expected[data :: place.dp] and loss == losses[rank]


def continue_together(grid: Grid, directory: Path, place: Place) -> list[list[int]]:
    """What `Continuer` returns for three prompts one by one, of which one data rank would have two."""
    engine, model = engine_on(grid, directory, place, RECIPE)
    continuer = Continuer(engine, model, None, cast(Any, NoTokenizer()), 1, SharedCalls())
    return continuer._run(PROMPTS[:3], NEW_TOKENS, [], Sampling())


class NoTokenizer:
    """Texts of which no stop text is a part."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return ""


@pytest.mark.parametrize("place", [Place(dp=2, expert=2), Place(dp=2)], ids=str)
def test_experts_over_data_ranks_continue_the_same_prompts(place: Place, once: Any) -> None:
    directory, expected = once(continue_by_transformers, KINDS["experts"])
    assert all(found == expected[:3] for found in run_grid(continue_together, place.layout, directory, place))


def refuse(grid: Grid, directory: Path, place: Place) -> str:
    engine, model = engine_on(grid, directory, place, RECIPE)
    with pytest.raises(TopologyError) as caught:
        Generator(engine.built, model.core, grid, rank_device())
    return str(caught.value)


@pytest.mark.parametrize(
    ("place", "message"), [(Place(tp=2, sp=True), "parallel.sequence"), (Place(dp=2, zero=3), "ZeRO-3")], ids=str
)
def test_what_divides_a_token_is_refused(place: Place, message: str, once: Any) -> None:
    directory, _ = once(continue_by_transformers, CASE)
    assert all(text.startswith(message) for text in run_grid(refuse, place.layout, directory, place))
