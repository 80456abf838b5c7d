"""The reference runs, made once a session and shared by all parity tests."""

from pathlib import Path
from typing import Any

import pytest

from tests.parity.cases import Recipe
from tests.parity.reference import train_reference
from tests.ranks import run_alone


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(case, recipe) -> (directory with the initial model, what the reference's training gave)."""
    made: dict[tuple[str, Recipe], tuple[Path, dict[str, Any]]] = {}

    def get(case: str, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
        if (case, recipe) not in made:
            directory = tmp_path_factory.mktemp(case)
            made[case, recipe] = directory, run_alone(train_reference, case, recipe, directory)
        return made[case, recipe]

    return get
