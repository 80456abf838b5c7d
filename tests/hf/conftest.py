"""Models on disk, made once."""

from pathlib import Path

import pytest

from tests.hf.models import save_all, save_encoders
from tests.made_once import MakeOnce


@pytest.fixture(scope="session")
def saved(once: MakeOnce) -> Path:
    """saved/case/dtype is what transformers' save_pretrained wrote."""
    return once(save_all)[0]


@pytest.fixture(scope="session")
def encoders(once: MakeOnce) -> Path:
    """encoders/case is the same for what is no decoder."""
    return once(save_encoders)[0]
