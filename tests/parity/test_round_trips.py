"""Every family goes through the tables and back bit for bit, in fp32, bf16 and fp16, and transformers loads the result.

Compared are the SHA-256 of every tensor's dtype, shape and bytes, and transformers' logits on source and result.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.hf.config import read_model
from megatron_ds.hf.reference import load_reference
from megatron_ds.hf.registry import FAMILIES
from megatron_ds.hf.weights import HFWeights
from megatron_ds.verify.run import check_round_trip
from tests.parity.cases import SEQ, VOCAB
from tests.parity.family_cases import FAMILY_CASES
from tests.parity.reference import make_model
from tests.ranks import run_alone

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _round_trip(case: str, dtype: str, folder: Path) -> dict[str, Any]:
    source, target = folder / "source", folder / "target"
    make_model(FAMILY_CASES[case]).to(DTYPES[dtype]).save_pretrained(source)
    weights = HFWeights(source, read_model(source))
    trip = check_round_trip(weights, source, target)
    ids = torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(0))
    attention = weights.model.family.reference_attention
    before, after = (load_reference(place, attention, torch.float32) for place in (source, target))
    with torch.no_grad():
        equal = torch.equal(before(input_ids=ids).logits, after(input_ids=ids).logits)
    return {"trip": trip, "logits equal": equal, "dtype": after.config.dtype, "config": read_model(target).core}


def check(case: str, dtype: str, folder: Path) -> None:
    found = run_alone(_round_trip, case, dtype, folder)
    assert found["trip"].changed == []
    assert len(found["trip"].sha256) > 20
    assert found["trip"].left_out == []
    assert found["logits equal"]
    assert found["config"] == read_model(folder / "source").core


def covering() -> list[tuple[str, str]]:
    """Each case once; of each family one type after the other."""
    seen, chosen = Counter[str](), []
    for case, config in FAMILY_CASES.items():
        chosen.append((case, list(DTYPES)[seen[config["model_type"]] % len(DTYPES)]))
        seen[config["model_type"]] += 1
    return chosen


COVERING = covering()
EVERYTHING = [(case, dtype) for case in FAMILY_CASES for dtype in DTYPES if (case, dtype) not in COVERING]


@pytest.mark.parametrize(("case", "dtype"), COVERING)
def test_bit_for_bit(case: str, dtype: str, tmp_path: Path) -> None:
    check(case, dtype, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "dtype"), EVERYTHING)
def test_every_case_bit_for_bit_in_every_type(case: str, dtype: str, tmp_path: Path) -> None:
    check(case, dtype, tmp_path)


def test_every_family_is_tried_in_every_type() -> None:
    for kind in FAMILIES:
        assert {dtype for case, dtype in COVERING if FAMILY_CASES[case]["model_type"] == kind} == DTYPES.keys(), kind
