"""The choice of kernels for the parts of a check: those that were found to compute the right thing."""

from __future__ import annotations

import json
from collections.abc import Mapping

from bench.gpu.record import OUT

_FILE = OUT / "kernels.json"


def write_choice(choice: Mapping[str, str]) -> None:
    """Keep a choice for the parts that follow."""
    _FILE.parent.mkdir(parents=True, exist_ok=True)
    _FILE.write_text(json.dumps(choice))


def read_choice() -> str | dict[str, str]:
    """Return the value for `train.kernels`: the choice of the part `kernels`, or "auto" if that has not run."""
    return dict(json.loads(_FILE.read_text())) if _FILE.is_file() else "auto"
