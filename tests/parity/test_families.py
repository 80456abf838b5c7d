"""Every family, in several configs, equals transformers at every layout: logits, loss, every gradient, in fp32.

Bounds are those of `megatron-ds verify`: outputs 1e-5 and gradients 1e-4, relative L2. The weights are random, norms
and biases too: no decoder's or T5's real weights are in a package registry.
"""

from collections import Counter
from typing import Any

import pytest

from megatron_ds.config import ParallelSection
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.weights import HFWeights
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.sampling import IN_FULL, first_cases
from tests.parity.verified import Verified, has_experts, runs_of

CASES = {**FAMILY_CASES, **ENCODER_CASES}
Place = tuple[int, int, bool]  # tp, pp, sequence parallel
PLACES: list[Place] = [
    (tp, pp, sequence) for tp in (1, 2, 4) for pp in (1, 2, 4) for sequence in ((False, True) if tp > 1 else (False,))
]
QUICK = [(2, 2, True), (4, 1, False), (4, 1, True), (1, 4, False), (2, 1, True), (2, 1, False)]


def fits(case: str, place: Place) -> bool:
    """Tensor ranks divide the query heads; other layouts are refused, which has its own test."""
    config = CASES[case].get("text_config", CASES[case])
    heads = next(config[name] for name in ("num_attention_heads", "n_head", "num_heads", "n_heads") if name in config)
    return heads % place[0] == 0


def covering() -> list[tuple[str, Place]]:
    """The first case of each type on all axes; of types tested in full two cases, on one axis of ranks after the
    other. Each case alone is in test_families_alone.py."""
    chosen, seen, firsts = [], Counter[str](), first_cases(CASES)
    for case, config in CASES.items():
        if config["model_type"] not in IN_FULL:
            chosen += [(case, QUICK[0])] if firsts[config["model_type"]] == case else []
            continue
        number = seen[config["model_type"]]
        seen[config["model_type"]] += 1
        if number > 1:
            continue
        start = number and 1 + len(seen) % (len(QUICK) - 1)
        chosen += [(case, next(place for place in QUICK[start:] + QUICK if fits(case, place)))]
    return chosen


COVERING = covering()
EVERYTHING = [
    (case, place) for case in CASES for place in PLACES if fits(case, place) and (case, place) not in COVERING
]


def layout_of(case: str, place: Place, weights: HFWeights) -> ParallelSection:
    tp, pp, sequence = place
    expert = tp if has_experts(weights) and pp == 1 else 1  # with a pipeline every tensor rank has all experts
    return ParallelSection(tensor=tp, pipeline=pp, sequence=sequence, expert=expert)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Verified:
    return Verified(CASES, layout_of, runs_of(request, "case", "place"), tmp_path_factory)


def test_every_family_has_several_cases() -> None:
    kinds = [FAMILIES[config["model_type"]].same_as or config["model_type"] for config in CASES.values()]
    counts = {kind: kinds.count(kind) for kind, family in FAMILIES.items() if family.same_as is None}
    assert min(counts.values()) >= 2, counts


def test_every_family_meets_every_axis() -> None:
    """In the covering sample: tensor ranks, pipeline ranks, sequence parallelism."""
    met = {kind: [place for case, place in COVERING if CASES[case]["model_type"] == kind] for kind in FAMILIES}
    for kind, places in met.items():
        assert any(tp > 1 for tp, _, _ in places), kind
        assert any(pp > 1 for _, pp, _ in places), kind
        assert any(sequence for _, _, sequence in places), kind


def ids(value: Any) -> str:
    return value if isinstance(value, str) else "tp{}pp{}sp{:d}".format(*value)


@pytest.mark.parametrize(("case", "place"), COVERING, ids=ids)
def test_a_family_equals_transformers(case: str, place: Place, verified: Verified) -> None:
    verified.check(case, place)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "place"), EVERYTHING, ids=ids)
def test_every_family_at_every_layout(case: str, place: Place, verified: Verified) -> None:
    verified.check(case, place)
