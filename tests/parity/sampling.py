"""The cases of `make test`: every case of the types below, and the first case of every other type. The sweep has all.

Types that share their blocks with one of these differ in names and options, which one case shows; the sweep runs each
case of each type at every layout. A list of cases is passed through `sampled` for `pytest.mark.parametrize`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

# Types that together have every option of the blocks, every rope, and every form of fused and stacked weights.
IN_FULL = frozenset(
    (
        *("gpt2", "gptj", "gpt_neox", "opt", "bloom", "falcon"),
        *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "granite", "smollm3"),
        *("starcoder2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared"),
        *("ernie4_5_moe", "glm4_moe", "dots1", "minimax_m2", "gpt_oss"),
        *("bert", "roberta", "xlm-roberta", "camembert", "t5", "mt5"),
    )
)


def first_cases(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return model type -> name of its first case."""
    return {config["model_type"]: case for case, config in reversed(cases.items())}


def in_sample(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the cases of `make test`, in their order."""
    firsts = first_cases(cases)
    return [
        case
        for case, config in cases.items()
        if config["model_type"] in IN_FULL or firsts[config["model_type"]] == case
    ]


def sampled(cases: Mapping[str, Mapping[str, Any]], names: Iterable[str] | None = None) -> list[Any]:
    """Return parameters for pytest: the names, those outside of the sample with the marker `sweep`.

    Args:
        cases: name -> config.
        names: of the cases to test; None = all.
    """
    sample = set(in_sample(cases))
    return [
        pytest.param(case, marks=() if case in sample else (pytest.mark.sweep,))
        for case in (cases if names is None else names)
    ]
