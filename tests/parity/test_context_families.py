"""Every family on context ranks equals transformers: outputs, loss, hidden states and every gradient, in fp32.

The checks and bounds are those of `test_families.py`. Each type's first case meets one method in `make test` where it
adds an option; in the sweep every case meets every method.
"""

import pytest

from megatron_ds.config import ParallelSection
from megatron_ds.hf.weights import HFWeights
from tests.parity.context_cases import GATHER_2, RING_2X2, TWO, with_axes
from tests.parity.ours import Place
from tests.parity.test_families import CASES, fits
from tests.parity.verified import Verified, has_experts, runs_of

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


def layout_of(case: str, place: Place, weights: HFWeights) -> ParallelSection:
    expert = 1 if has_experts(weights) else None
    return ParallelSection(tensor=place.tp, sequence=place.sp, context=place.context, expert=expert)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Verified:
    # where a rotation depends on the length, no row of a multiple of 16 is padded
    return Verified(CASES, layout_of, runs_of(request, "case", "place"), tmp_path_factory, multiple_of=16)


@pytest.mark.parametrize(("case", "place"), SAMPLE, ids=str)
def test_a_family_equals_transformers(case: str, place: Place, verified: Verified) -> None:
    verified.check(case, place)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "place"), EVERYTHING, ids=str)
def test_every_family_by_every_method(case: str, place: Place, verified: Verified) -> None:
    verified.check(case, place)
