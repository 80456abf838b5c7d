"""Models on disk, made once."""

from pathlib import Path

import pytest

from tests.hf.models import save_all, save_encoders
from tests.ranks import run_alone


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """saved/case/dtype is what transformers' save_pretrained wrote."""
    directory = tmp_path_factory.mktemp("saved")
    run_alone(save_all, directory)
    return directory


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """encoders/case is the same for what is no decoder."""
    directory = tmp_path_factory.mktemp("encoders")
    run_alone(save_encoders, directory)
    return directory
