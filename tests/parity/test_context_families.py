"""Every family on context ranks equals transformers: outputs, loss, hidden states and every gradient, in fp32.

The checks and bounds are those of `test_families.py`. Each type's first case meets one method in `make test` where it
adds an option; in the sweep every case meets every method.
"""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_ds.config import ParallelSection
from tests.parity import test_families
from tests.parity.context_cases import GATHER_2, RING_2X2, TWO, with_axes
from tests.parity.ours import Place
from tests.parity.test_families import CASES, Prepared, fits, prepare

# Sinks and windows; growing queries; biases by distance; windows on both sides.
SAMPLE = [
    ("gpt_oss-yarn", RING_2X2),
    ("ministral3-yarn", GATHER_2),
    ("falcon-40b-alibi-one-group", RING_2X2),
    ("modernbert-masked", GATHER_2),
]
EVERYTHING = [
    (case, place)
    for case in CASES
    for place in (*TWO, RING_2X2, with_axes(RING_2X2, 2, 1, 1, 0, True))
    if (case, place) not in SAMPLE and fits(case, (place.tp * (place.ulysses or place.cp), place.pp, False))
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    return prepare(CASES, tmp_path_factory, multiple_of=16)  # where a rotation depends on the length, none is padded


def check(case: str, place: Place, prepared: Callable[[str], Prepared]) -> None:
    expert = 1 if any(stack.moe is not None for stack in prepared(case)[1].model.core.stacks.values()) else None
    parallel = ParallelSection(tensor=place.tp, sequence=place.sp, context=place.context, expert=expert)  # type: ignore[arg-type]
    test_families.check_at(case, parallel, prepared)


@pytest.mark.parametrize(("case", "place"), SAMPLE, ids=str)
def test_a_family_equals_transformers(case: str, place: Place, prepared: Any) -> None:
    check(case, place, prepared)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "place"), EVERYTHING, ids=str)
def test_every_family_by_every_method(case: str, place: Place, prepared: Any) -> None:
    check(case, place, prepared)
