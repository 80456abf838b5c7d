"""Directories to verify, made by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity.reference import make_model
from tests.ranks import run_alone


def _save(config: dict[str, Any], directory: Path) -> None:
    make_model(config).save_pretrained(directory)


@pytest.fixture(scope="session")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Config fields -> a directory with random weights, made once."""
    made: dict[str, Path] = {}

    def get(config: dict[str, Any]) -> Path:
        key = repr(config)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(config["model_type"])
            run_alone(_save, config, made[key])
        return made[key]

    return get
