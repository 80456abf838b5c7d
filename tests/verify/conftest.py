"""Directories to verify, made by transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.made_once import MakeOnce
from tests.parity.reference import make_model


def _save(config: dict[str, Any], directory: Path) -> None:
    make_model(config).save_pretrained(directory)


@pytest.fixture(scope="session")
def directory_of(once: MakeOnce) -> Callable[[dict[str, Any]], Path]:
    """Config fields -> a directory with random weights, made once."""
    return lambda config: once(_save, config)[0]
