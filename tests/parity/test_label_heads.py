"""Heads for labels equal transformers' in logits, loss and every gradient, alone and at every layout, in fp32.

Bounds are those of `megatron-ds verify`: outputs and loss 1e-5, gradients 1e-4, relative. Seen errors are below 2e-6
and 2e-5; another pick, padding or activation moves the logits by more than 1e-3.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.hf.config import read_model
from megatron_ds.hf.label_classes import label_classes
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.weights import HFWeights
from megatron_ds.verify.run import check_round_trip
from tests.parity.label_head_cases import BASE_CASES, EVERY_CLASS, FIRSTS, LABEL_HEAD_CASES, SAMPLE
from tests.parity.label_heads import HeadRun, measure_all
from tests.parity.reference import make_model
from tests.parity.test_families import Place, ids, layout_of
from tests.parity.verified import Verified, runs_of
from tests.ranks import run_alone

IN_SAMPLE = [case for case in LABEL_HEAD_CASES if case in SAMPLE]
CASES = [pytest.param(case, marks=() if case in SAMPLE else (pytest.mark.sweep,)) for case in LABEL_HEAD_CASES]
PLACES: list[Place] = [(2, 2, True), (4, 1, True), (1, 4, False), (2, 1, False)]
COVERING: list[tuple[str, Place]] = [
    ("llama-sequence", (2, 2, True)),
    ("bert-token", (2, 2, True)),
    ("roberta-sequence", (4, 1, True)),
    ("t5-sequence", (2, 2, True)),
    ("qwen3-no-head", (2, 2, True)),
]
AT_LAYOUTS = {**LABEL_HEAD_CASES, **BASE_CASES}
EVERYTHING = [(case, place) for case in AT_LAYOUTS for place in PLACES if (case, place) not in COVERING]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Verified:
    return Verified(AT_LAYOUTS, layout_of, runs_of(request, "case", "place"), tmp_path_factory)


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
def test_a_head_at_a_layout(case: str, place: Place, verified: Verified) -> None:
    verified.check(case, place)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "place"), EVERYTHING, ids=ids)
def test_every_head_at_every_layout(case: str, place: Place, verified: Verified) -> None:
    verified.check(case, place)


def _changed(cases: Mapping[str, dict[str, Any]], dtype: str, folder: Path) -> dict[str, list[str]]:
    """Rewrite a model of each case; return the names of tensors that are others afterwards, or are left out."""
    found = {}
    for case, config in cases.items():
        model = make_model(config).to(DTYPES[dtype])
        if dtype == "fp32":  # of two dtypes
            for parameter in list(model.parameters())[::2]:
                parameter.data = parameter.data.bfloat16()
        model.save_pretrained(folder / case)
        weights = HFWeights(folder / case, read_model(folder / case))
        trip = check_round_trip(weights, folder / case, folder / f"{case}-again")
        found[case] = [*trip.changed, *trip.left_out]
    return found


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_head_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    found = run_alone(_changed, AT_LAYOUTS, dtype, tmp_path, timeout_s=280.0)
    assert found == {case: [] for case in AT_LAYOUTS}
