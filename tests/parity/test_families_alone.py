"""Every family in one process equals transformers: logits, loss, every gradient, in fp32; and the config that we write.

Bounds: relative L2 of 1e-5 for logits and loss, 1e-4 for gradients. Seen errors are below 2e-6 and 1e-5; leaving out any
option of a case moves them past the bounds, mostly by orders of magnitude. The weights are random, norms and biases too.
"""

from pathlib import Path

import pytest
import torch

from megatron_ds.hf.registry import FAMILIES
from tests.parity.alone import Apart, logits_of_both_configs, measure, without_each_option
from tests.parity.family_cases import FAMILY_CASES
from tests.ranks import run_alone

# A key mask meets each family once, in the case that has most to get wrong with it.
PADDED = (
    "gpt2-plain",
    "gptj-partial",
    "gpt_neox-parallel",
    "opt-before",
    "bloom-six-heads",
    "falcon-7b-alibi",
    "llama-one-kv-head",
    "mistral-window",
    "qwen2-windows-tied",
    "qwen3-bias-windows",
    "phi3-longrope-beyond",
    "gemma2-caps",
    "gemma3_text-two-ropes",
    "olmo2-one-kv-head",
    "granite-multipliers-tied",
    "smollm3-windows-untied",
    "starcoder2-window",
)

# What leaves no trace in a sequence of this length.
NO_TRACE = {("llama-dynamic", "scaling and pairs of rotary")}


def family(case: str) -> str:
    return str(FAMILY_CASES[case]["model_type"])


def test_every_family_has_cases_and_one_is_padded() -> None:
    assert {family(case) for case in FAMILY_CASES} == set(FAMILIES)
    assert sorted(family(case) for case in PADDED) == sorted(FAMILIES)
    assert all(sum(family(case) == name for case in FAMILY_CASES) >= 3 for name in FAMILIES)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    apart: Apart = run_alone(measure, case, tmp_path)
    assert apart.within_bounds(), (apart.logits, apart.loss, apart.worst)


@pytest.mark.parametrize("case", PADDED)
def test_equals_transformers_behind_padding(case: str, tmp_path: Path) -> None:
    apart: Apart = run_alone(measure, case, tmp_path, True)
    assert apart.within_bounds(), (apart.logits, apart.loss, apart.worst)


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_every_option_of_a_case_matters(case: str, tmp_path: Path) -> None:
    """Else the case would prove nothing about it."""
    found: dict[str, Apart] = run_alone(without_each_option, case, tmp_path)
    unseen = {name for name, apart in found.items() if apart.within_bounds()}
    assert unseen == {option for known, option in NO_TRACE if known == case}


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_written_config_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    theirs, ours = run_alone(logits_of_both_configs, case, tmp_path)
    assert torch.equal(theirs, ours)
