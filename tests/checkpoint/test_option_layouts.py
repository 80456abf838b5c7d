"""Weights that are no parameters, and norms with a tensor for each head: saved at one layout, resumed at another."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ds.checkpoint.directory import name_of
from tests.checkpoint.runs import CUT, apart, resumed_at, saved_at
from tests.hf.models import hashes
from tests.parity.cases import Recipe
from tests.parity.ours import Place

RECIPE = Recipe(steps=4)
PAIRS = [
    ("apertus-bias", Place(2, 1, 1, 1, True), Place(1, 2, 2, 1)),
    pytest.param("stablelm-parallel-normed-heads", Place(4, 1, 1, 1), Place(1, 1, 2, 3), marks=pytest.mark.sweep),
    pytest.param("apertus-bias", Place(1, 1, 2, 3), Place(2, 2, 1, 1, True), marks=pytest.mark.sweep),
    pytest.param("cohere-normed-two-kv-heads", Place(1, 1, 1, 0), Place(4, 1, 1, 1, True), marks=pytest.mark.sweep),
]


@pytest.mark.parametrize(("case", "source", "target"), PAIRS, ids=str)
def test_another_layout_goes_on_where_one_stopped(
    case: str, source: Place, target: Place, references: Any, tmp_path: Path
) -> None:
    directory, reference = references(case, RECIPE)
    saved_at(directory, source, RECIPE, tmp_path)
    checkpoint = tmp_path / name_of(CUT)
    expected = list(zip(reference["losses"], reference["norms"]))[CUT:]
    loss, norm = apart(resumed_at(checkpoint, target, RECIPE), expected)
    assert loss < 2e-5 and norm < 1e-4, (loss, norm)
    constants = [name for name in hashes(directory) if name.endswith(("act_fn.beta", "act_fn.eps"))]
    assert len(constants) == (8 if case.startswith("apertus") else 0)
    assert all(hashes(checkpoint)[name] == hashes(directory)[name] for name in constants)
