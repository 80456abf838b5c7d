"""Parts of long lists of cases: some in `make test`, all in the sweep."""

from collections.abc import Iterable
from typing import Any

import pytest


def halved(cases: Iterable[Any]) -> list[Any]:
    """Parameters for pytest in their order, of which every second one has the marker `sweep`."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.sweep if number % 2 else ())
        for number, case in enumerate(cases)
    ]


def swept(*cases: Any) -> list[Any]:
    """Parameters for pytest with the marker `sweep`."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.sweep) for case in cases]
