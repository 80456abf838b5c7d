"""Every family goes through the tables and back bit for bit, in fp32, bf16 and fp16, and transformers loads the result.

Compared are the SHA-256 of every tensor's dtype, shape and bytes, and what transformers predicts from both.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.hf.config import read_model
from megatron_ds.hf.reference import load_reference, predict
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.weights import HFWeights
from megatron_ds.models.t5 import EncoderDecoderConfig
from megatron_ds.verify.run import check_round_trip
from tests.parity.cases import SEQ, VOCAB
from tests.parity.encoder_cases import ENCODER_CASES
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.reference import make_model
from tests.parity.sampling import IN_FULL
from tests.ranks import run_alone

CASES = {**FAMILY_CASES, **ENCODER_CASES}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _round_trip(case: str, dtype: str, folder: Path) -> dict[str, Any]:
    source, target = folder / "source", folder / "target"
    make_model(CASES[case]).to(DTYPES[dtype]).save_pretrained(source)
    weights = HFWeights(source, read_model(source))
    trip = check_round_trip(weights, source, target)
    columns = {"input_ids": torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(0))}
    if isinstance(weights.model.core, EncoderDecoderConfig):
        columns["decoder_input_ids"] = columns["input_ids"].flip(1)
    before, after = (load_reference(place, weights.model, torch.float32) for place in (source, target))
    with torch.no_grad():
        one, other = (predict(theirs, weights.model, columns) for theirs in (before, after))
    equal = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return {
        "trip": trip,
        "outputs": sorted(one) if equal else [],
        "config": HFWeights(target, read_model(target)).model.core,
    }


def check(case: str, dtype: str, folder: Path) -> None:
    found = run_alone(_round_trip, case, dtype, folder)
    assert found["trip"].changed == []
    assert len(found["trip"].sha256) > 20
    assert found["trip"].left_out == []
    assert found["outputs"]
    assert found["config"] == HFWeights(folder / "source", read_model(folder / "source")).model.core


def covering() -> list[tuple[str, str]]:
    """Of each family tested in full one case in each type."""
    seen, chosen = Counter[str](), []
    for case in CASES:
        family = family_of_case(case)
        if CASES[case]["model_type"] in IN_FULL and seen[family] < len(DTYPES):
            chosen.append((case, list(DTYPES)[seen[family]]))
            seen[family] += 1
    return chosen


def family_of_case(case: str) -> str:
    """Return the model type of a case, or the one with the same tensors."""
    model_type = CASES[case]["model_type"]
    return FAMILIES[model_type].same_as or model_type


COVERING = covering()
EVERYTHING = [(case, dtype) for case in CASES for dtype in DTYPES if (case, dtype) not in COVERING]


@pytest.mark.parametrize(("case", "dtype"), COVERING)
def test_bit_for_bit(case: str, dtype: str, tmp_path: Path) -> None:
    check(case, dtype, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "dtype"), EVERYTHING)
def test_every_case_bit_for_bit_in_every_type(case: str, dtype: str, tmp_path: Path) -> None:
    check(case, dtype, tmp_path)


def test_every_family_is_tried_in_every_type() -> None:
    for kind, family in FAMILIES.items():
        tried = COVERING if kind in IN_FULL else EVERYTHING
        assert family.same_as or {dtype for case, dtype in tried if family_of_case(case) == kind} == DTYPES.keys()
