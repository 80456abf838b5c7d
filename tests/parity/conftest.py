"""The reference runs, made once a session and shared by all parity tests."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.made_once import MakeOnce
from tests.parity.cases import Recipe
from tests.parity.reference import train_reference


@pytest.fixture(scope="session")
def references(once: MakeOnce) -> Callable[[str, Recipe], tuple[Path, dict[str, Any]]]:
    """(case, recipe) -> (directory with the initial model, what the reference's training gave)."""

    @cache
    def get(case: str, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
        return once(train_reference, case, recipe)

    return get
