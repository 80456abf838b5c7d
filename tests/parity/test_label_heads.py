"""Heads for labels equal transformers' in logits, loss and every gradient, alone and at every layout, in fp32.

Bounds are those of `megatron-ds verify`: outputs and loss 1e-5, gradients 1e-4, relative. Seen errors are below 2e-6
and 2e-5; another pick, padding or activation moves the logits by more than 1e-3.
"""

from collections.abc import Callable

import pytest

from megatron_ds.hf.label_classes import label_classes
from megatron_ds.hf.registry import FAMILIES
from tests.parity.label_head_cases import EVERY_CLASS, FIRSTS, LABEL_HEAD_CASES, SAMPLE
from tests.parity.label_heads import HeadRun, measure_all
from tests.parity.test_families import Place, Prepared, check, ids, prepare
from tests.ranks import run_alone

Prepare = Callable[[str], Prepared]
IN_SAMPLE = [case for case in LABEL_HEAD_CASES if case in SAMPLE]
CASES = [pytest.param(case, marks=() if case in SAMPLE else (pytest.mark.sweep,)) for case in LABEL_HEAD_CASES]
PLACES: list[Place] = [(2, 2, True), (4, 1, True), (1, 4, False), (2, 1, False)]
COVERING: list[tuple[str, Place]] = [
    ("llama-sequence", (2, 2, True)),
    ("bert-token", (2, 2, True)),
    ("roberta-sequence", (4, 1, True)),
    ("t5-sequence", (2, 2, True)),
]
EVERYTHING = [(case, place) for case in LABEL_HEAD_CASES for place in PLACES if (case, place) not in COVERING]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], HeadRun]:
    """What was measured of a case; those of the sample, and those of the sweep, in one process each."""
    made: dict[bool, dict[str, HeadRun | str]] = {}

    def get(case: str) -> HeadRun:
        group = case in SAMPLE
        if group not in made:
            cases = {name: config for name, config in LABEL_HEAD_CASES.items() if (name in SAMPLE) == group}
            made[group] = run_alone(measure_all, cases, tmp_path_factory.mktemp("heads"), timeout_s=280.0)
        result = made[group][case]
        assert isinstance(result, HeadRun), result
        return result

    return get


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    return prepare(LABEL_HEAD_CASES, tmp_path_factory)


def test_every_class_of_every_type_has_a_case() -> None:
    """Of types that have cases at all."""
    known = {name for kind in FIRSTS for name in label_classes(FAMILIES[kind])}
    assert {config["architectures"][0] for config in EVERY_CLASS.values()} == known


@pytest.mark.parametrize("case", CASES)
def test_a_head_equals_transformers(case: str, found: Callable[[str], HeadRun]) -> None:
    run = found(case)
    assert run.within_bounds(), run
    assert not run.misfits and run.config
    assert all(error > 1e-3 for error in run.others.values()), run.others


@pytest.mark.parametrize(("case", "place"), COVERING, ids=ids)
def test_a_head_at_a_layout(case: str, place: Place, prepared: Prepare) -> None:
    check(case, place, prepared)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "place"), EVERYTHING, ids=ids)
def test_every_head_at_every_layout(case: str, place: Place, prepared: Prepare) -> None:
    check(case, place, prepared)
