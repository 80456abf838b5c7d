"""Generation by complete forward passes of an engine, at layouts whose ranks cannot share a row of one token."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.generation import generate_by_rows
from megatron_ds.parallel.grid import Grid
from tests.generation.models import KINDS, NEW_TOKENS, PROMPTS, continue_by_transformers
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_on
from tests.parity.reference import ALL_CONFIGS
from tests.ranks import run_grid

SEQUENCE, ZERO_3, STAGES, CONTEXT = Place(tp=2, sp=True), Place(dp=2, zero=3), Place(pp=2), Place(cp=2)
SAMPLE = [
    (KINDS["rope, grouped heads"], SEQUENCE),
    (KINDS["learned positions"], ZERO_3),
    (KINDS["windows, caps"], CONTEXT),
    (KINDS["relative biases, encoder"], STAGES),
]
REST = [
    (KINDS["relative biases, encoder"], SEQUENCE),
    (KINDS["relative biases, encoder"], ZERO_3),
    (KINDS["sinks, experts"], STAGES),
    (KINDS["experts"], SEQUENCE),
    (KINDS["ALiBi"], ZERO_3),
    (KINDS["rope, grouped heads"], CONTEXT),
]


def generate(grid: Grid, directory: Path, place: Place) -> list[list[int]]:
    engine, model = engine_on(grid, directory, place, Recipe(steps=1))
    return [row.ids for row in generate_by_rows(engine, model.core, PROMPTS, NEW_TOKENS)]


@pytest.mark.parametrize(
    ("case", "place"), [*SAMPLE, *(pytest.param(*one, marks=pytest.mark.sweep) for one in REST)], ids=str
)
def test_equals_transformers(case: str, place: Place, once: Any) -> None:
    directory, expected = once(continue_by_transformers, case)
    for found in run_grid(generate, place.layout, directory, place):
        assert found == expected


def test_a_table_of_positions_that_ranks_cannot_divide_is_used_to_its_end(once: Any) -> None:
    length = max(map(len, PROMPTS)) + NEW_TOKENS
    assert length % SEQUENCE.tp
    ALL_CONFIGS["odd-table"] = {**ALL_CONFIGS[KINDS["learned positions"]], "n_positions": length}
    directory, expected = once(continue_by_transformers, "odd-table")
    for found in run_grid(generate, SEQUENCE.layout, directory, SEQUENCE):
        assert found == expected
