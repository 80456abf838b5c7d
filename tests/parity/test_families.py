"""Every family, in several configs, equals transformers at every layout: logits, loss, every gradient, in fp32.

Bounds are those of `megatron-ds verify`: outputs 1e-5 and gradients 1e-4, relative L2. The weights are random, norms
and biases too: no decoder's or T5's real weights are in a package registry.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import ParallelSection
from megatron_ds.hf.config import read_model
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.weights import HFWeights
from megatron_ds.models.probe import Probe
from megatron_ds.verify.layer_names import position_names
from megatron_ds.verify.loss import ReferenceLoss
from megatron_ds.verify.ours import run_rank
from megatron_ds.verify.reference import run_reference
from megatron_ds.verify.run import merge
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.reference import make_model
from tests.parity.sampling import IN_FULL, first_cases
from tests.ranks import run_alone, run_local_ranks

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
Prepared = tuple[Path, HFWeights, list[Probe], list[ReferenceLoss]]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    return prepare(CASES, tmp_path_factory)


def prepare(
    cases: dict[str, dict[str, Any]], folders: pytest.TempPathFactory, multiple_of: int = 4
) -> Callable[[str], Prepared]:
    """Case -> what transformers computes for it, for rows of multiples of a length: made once."""
    made: dict[str, Prepared] = {}

    def get(case: str) -> Prepared:
        if case not in made:
            directory, results = folders.mktemp("model"), folders.mktemp("results")
            run_alone(_save, cases[case], directory)
            weights = HFWeights(directory, read_model(directory))
            inputs, _ = weights.model.core.probes(multiple_of)
            losses = run_alone(run_reference, directory, weights.model, inputs, results)
            made[case] = results, weights, inputs, losses
        return made[case]

    return get


def _save(config: dict[str, Any], directory: Path) -> None:
    make_model(config).save_pretrained(directory)


def check(case: str, place: Place, prepared: Callable[[str], Prepared]) -> None:
    tp, pp, sequence = place
    has_experts = any(stack.moe is not None for stack in prepared(case)[1].model.core.stacks.values())
    expert = tp if has_experts and pp == 1 else 1  # with a pipeline every tensor rank has all experts
    check_at(case, ParallelSection(tensor=tp, pipeline=pp, sequence=sequence, expert=expert), prepared)


def check_at(case: str, parallel: ParallelSection, prepared: Callable[[str], Prepared]) -> None:
    results, weights, inputs, losses = prepared(case)
    ranks = run_local_ranks(run_rank, parallel.least_ranks, weights, inputs, parallel, results)
    for probe, loss, found in zip(inputs, losses, zip(*ranks)):
        report = merge(probe, loss, found)
        assert report.ok, (report.name, report.outputs, report.loss, report.worst_gradient, report.first_difference)
        assert report.first_difference is None
        assert list(report.hidden) == position_names(weights.model.core)
    gradients = merge(inputs[0], losses[0], next(zip(*ranks))).gradients
    assert gradients.keys() == {name for row in weights.model.table.values() for name in row.names}


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
def test_a_family_equals_transformers(case: str, place: Place, prepared: Callable[[str], Prepared]) -> None:
    check(case, place, prepared)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "place"), EVERYTHING, ids=ids)
def test_every_family_at_every_layout(case: str, place: Place, prepared: Callable[[str], Prepared]) -> None:
    check(case, place, prepared)
