"""Runs on the tiny corpus."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import RunConfig, build_run
from tests.training.tiny import run_mapping


@pytest.fixture
def make_run(corpus: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run on the corpus; keyword arguments replace sections' entries."""

    def make(name: str = "run", format: str = "text", **sections: dict[str, Any]) -> RunConfig:
        mapping = run_mapping(corpus, tmp_path / name, format)
        for section, entries in sections.items():
            mapping[section] = {**mapping.get(section, {}), **entries}
        return build_run(mapping)

    return make
