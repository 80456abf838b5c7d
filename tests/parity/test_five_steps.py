"""Every family trained for five steps at three layouts is what transformers and AdamW make of it: decay, norm, weights.

Bounds are those of `test_layouts`, whose families are here too. `make test` has one layout of a few types.
"""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.parity.cases import Recipe
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.errors import relative_errors, within_fp32
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.ours import Place, train_ours
from tests.parity.sampling import first_cases


def has_loss(config: Mapping[str, Any]) -> bool:
    """A base model has no head that could be trained."""
    return not str(config.get("architectures", [""])[0]).endswith("Model")


PLACES = (Place(2, 1, 1, 1, True), Place(2, 2, 1, 1), Place(1, 1, 2, 3))
RECIPE = Recipe()
CASES = {**FAMILY_CASES, **ENCODER_CASES}
FIRST = first_cases({name: config for name, config in CASES.items() if has_loss(config)})

# Norms at the outputs, norms around with pairs of adjacent dims, multipliers, norms of heads, scalars of an activation.
# Each at one place.
SAMPLE = [
    (FIRST["exaone4"], PLACES[0]),
    (FIRST["glm4"], PLACES[1]),
    (FIRST["hyperclovax"], PLACES[2]),
    (FIRST["cohere"], PLACES[0]),
    (FIRST["apertus"], PLACES[1]),
    (FIRST["gpt_neo"], PLACES[2]),
]
EVERYTHING = [(case, place) for case in FIRST.values() for place in PLACES]


def check(case: str, place: Place, references: Any) -> None:
    directory, reference = references(case, RECIPE)
    errors = relative_errors(train_ours(directory, place, RECIPE), reference)
    assert within_fp32(errors), errors


@pytest.mark.parametrize(("case", "place"), SAMPLE, ids=str)
def test_five_steps_equal_transformers(case: str, place: Place, references: Any) -> None:
    check(case, place, references)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "place"), [pair for pair in EVERYTHING if pair not in SAMPLE], ids=str)
def test_five_steps_of_every_family_equal_transformers(case: str, place: Place, references: Any) -> None:
    check(case, place, references)
