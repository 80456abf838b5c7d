"""docs/scale.md: every row of its tables is what the planner says."""

import pytest

from tests.docs.scale_table import PAGE, PlannedRow, figures_of, plan_of, rows_of

ROWS = rows_of(PAGE.read_text(encoding="utf-8"))
QUICK = ("llama3_8b",)
"""Models whose rows `make test` plans; the sweep plans all."""


def test_all_models_are_there() -> None:
    assert {row.model for row in ROWS} == {"llama3_8b", "llama3_70b", "llama3_405b", "qwen3_235b"}
    assert max(row.gpus for row in ROWS) == 4096 and min(row.gpus for row in ROWS) == 1


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=() if row.model in QUICK else pytest.mark.sweep) for row in ROWS],
    ids=lambda row: f"{row.model}-{row.gpus}-{row.overrides}",
)
def test_a_row_is_what_the_planner_says(row: PlannedRow) -> None:
    assert figures_of(plan_of(row)) == row.figures, "python -m tests.docs.scale_table writes the figures"
