"""A hub on this machine that this process and its children use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import fork, start  # noqa: F401
from tests.hub.local_hub import LocalHub, running_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with running_hub(tmp_path, monkeypatch) as found:
        yield found
