"""Values of a plan as text and as JSON: percents, and numbers that JSON has none for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def percent(share: float, digits: int = 0) -> str:
    """Return a share as text, such as `28 %`, or `27.2 %` with one digit."""
    return f"{100 * share:.{digits}f} %"


def strict(value: Any) -> Any:
    """Return plain data with None for every number that JSON does not have: infinite ones, and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: strict(one) for name, one in value.items()}
    return [strict(one) for one in value] if isinstance(value, list | tuple) else value
