"""Encoders and encoder-decoders: five steps equal a plain transformers + AdamW loop at every layout.

With padding, uneven labels and the next-sentence loss. The bounds are those of decoders; see test_layouts.
"""

from dataclasses import replace
from typing import Any

import pytest

from tests.parity.cases import Recipe
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.ours import Place, train_ours

PLACES = [
    Place(1, 1, 1, 1),
    Place(2, 1, 1, 1, True),
    Place(1, 2, 1, 1),
    Place(2, 2, 1, 1, True),
    Place(2, 1, 2, 2),
    Place(1, 1, 2, 3),
    Place(1, 4, 1, 1),
]
MORE_PLACES = [
    Place(4, 1, 1, 1, True),
    Place(4, 1, 1, 1),
    Place(2, 4, 1, 1, True),
    Place(2, 2, 2, 1, True),
    Place(2, 1, 2, 3, True),
    Place(1, 1, 2, 0),
]
TRAINED = ("bert-pretraining", "bert-masked", "roberta-masked", "t5-tied-relu", "t5-gated")
RECIPE = Recipe()
CASES = [(case, place) for case in TRAINED for place in PLACES]
RECOMPUTED = [
    (case, replace(place, recompute=mode))
    for case in TRAINED
    for place in (*PLACES, *MORE_PLACES)
    for mode in ("selective", "full")
]


@pytest.mark.parametrize(("case", "place"), CASES + RECOMPUTED[::7], ids=str)
def test_five_steps_equal_transformers(case: str, place: Place, references: Any) -> None:
    directory, reference = references(case, RECIPE)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("case", "place"),
    [(case, place) for case in TRAINED for place in MORE_PLACES]
    + [one for one in RECOMPUTED if one not in RECOMPUTED[::7]],
    ids=str,
)
def test_every_combination_equals_transformers(case: str, place: Place, references: Any) -> None:
    directory, reference = references(case, RECIPE)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors
